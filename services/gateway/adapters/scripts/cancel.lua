-- cancel(job_id, submission, outcome, used_tokens [, position, event ...])
-- Withdraws a submission: the job ends if it waits, and also if it was granted without its gateway having
-- heard of it yet. The submission's nonce keeps it from ending a namesake. The outcome is 'cancelled', unless the
-- request has come to another end. Of a resumable job it carries the events that were not appended yet.
-- Returns the caller's grants.

local id, submission, outcome, used_tokens = ARGV[6], ARGV[7], ARGV[8], tonumber(ARGV[9])

local job = load_job(id)
if is_live(job) and job.submission == submission then
  if ARGV[10] and job.keep_ms then append_log(job, tonumber(ARGV[10]), 11) end
  finish_job(job, outcome, used_tokens)
end
grant_free()
return GRANTED
