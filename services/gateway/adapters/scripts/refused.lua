-- refused(job_id, nonce, hold_ms)
-- Puts a job back whose worker had no room for it after all. The worker is held a moment; the job pays no
-- attempt and keeps its place.
-- Returns {1 | 0, grants}: whether the grant was current.

local id, nonce, hold_ms = ARGV[6], ARGV[7], tonumber(ARGV[8])

local current = put_back(id, nonce, function(job)
  suspect_worker(job.worker, hold_ms)
  job.avoid = job.worker
  job.attempt = tonumber(job.attempt) - 1
end)
return { current, GRANTED }
