-- requeue(job_id, nonce, pin | '', suspect_ms, pin_ms, used_tokens)
-- Puts a job back at its old place after its worker failed; pinned to the revision whose text it has. What it
-- has used so far is noted, and charged when it ends, be it while it waits.
-- The worker is suspect for a moment, and the next attempt prefers another one.
-- Returns {1 | 0, grants}: whether the grant was current.

local id, nonce, pin, suspect_ms, pin_ms = ARGV[6], ARGV[7], ARGV[8], tonumber(ARGV[9]), tonumber(ARGV[10])
local used_tokens = tonumber(ARGV[11])

local current = put_back(id, nonce, function(job)
  suspect_worker(job.worker, suspect_ms)
  job.avoid = job.worker
  if pin ~= '' then job.pin = pin end
  job.pin_until = NOW + pin_ms
  note_used(job, used_tokens)
end)
return { current, GRANTED }
