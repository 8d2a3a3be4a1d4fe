-- cancel(job_id, submission, used_tokens [, position, event ...])
-- Withdraws a submission: the job ends if it waits, and also if it was granted without its gateway having
-- heard of it yet. The submission's nonce keeps it from ending a namesake. Of a resumable job it carries the
-- events that were not appended yet.
-- Returns the caller's grants.

local id, submission, used_tokens = ARGV[6], ARGV[7], tonumber(ARGV[8])

local job = load_job(id)
if is_live(job) and job.submission == submission then
  if ARGV[9] and job.keep_ms then append_log(job, tonumber(ARGV[9]), 10) end
  finish_job(job, 'cancelled', used_tokens)
end
grant_free()
return GRANTED
