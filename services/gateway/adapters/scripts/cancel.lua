-- cancel(job_id, submission [, position, event ...])
-- Withdraws a submission: the job ends if it waits, and also if it was granted without its gateway having
-- heard of it yet. The submission's nonce keeps it from ending a namesake. Of a resumable job it carries the
-- events that were not appended yet.
-- Returns the caller's grants.

local id, submission = ARGV[6], ARGV[7]

local job = load_job(id)
if is_live(job) and job.submission == submission then
  if ARGV[8] and job.keep_ms then append_log(job, tonumber(ARGV[8]), 9) end
  finish_job(job, 'cancelled')
end
grant_free()
return GRANTED
