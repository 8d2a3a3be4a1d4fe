-- cancel(job_id, submission)
-- Withdraws a submission: the job ends if it waits, and also if it was granted without its gateway having
-- heard of it yet. The submission's nonce keeps it from ending a namesake.
-- Returns the caller's grants.

local id, submission = ARGV[6], ARGV[7]

local job = load_job(id)
if is_live(job) and job.submission == submission then finish_job(job, 'cancelled') end
grant_free()
return GRANTED
