-- stop(job_id)
-- Ends a job for its subject, whichever gateway has it: at once where it waits; where it runs its owner is
-- told, by a message and by its next renewal.
-- Returns {'unknown' | 'ended' | 'stopped', grants}.

local id = ARGV[6]

local job = load_job(id)
local was_live = is_live(job)
if was_live then
  notify(job.owner, 'stop', id)
  if job.state == 'waiting' then
    finish_job(job, 'cancelled')
  else
    redis.call('HSET', PREFIX .. 'job:' .. id, 'cancelled', '1')
  end
end
grant_free()
return { not job and 'unknown' or was_live and 'stopped' or 'ended', GRANTED }
