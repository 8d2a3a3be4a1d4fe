-- stop(job_id)
-- Ends a job for its subject, whichever gateway has it: at once where it waits; where it runs its owner is
-- told, by a message and by its next renewal. Its record keeps the nonce of the call, which has the same answer if it
-- is repeated.
-- Returns {'unknown' | 'ended' | 'stopped', grants}.

local id = ARGV[6]

local job = load_job(id)
local stopped = is_live(job) or job and job.stopped_by == CALL_NONCE
if is_live(job) then
  notify(job.owner, 'stop', id)
  job.stopped_by = CALL_NONCE
  if job.state == 'waiting' then
    finish_job(job, 'cancelled')
  else
    redis.call('HSET', PREFIX .. 'job:' .. id, 'cancelled', '1', 'stopped_by', CALL_NONCE)
  end
end
grant_free()
return { not job and 'unknown' or stopped and 'stopped' or 'ended', GRANTED }
