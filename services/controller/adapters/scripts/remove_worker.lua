-- remove_worker(fence, worker_id)
-- Removes a worker's record, so that it gets no more jobs. What runs on it ends with its jobs' leases. Breakers of
-- a process that is gone bar nobody, and would have every grant look for them.
-- Returns 1, or 0 if the fence is stale.

local worker_id = ARGV[2]

if is_stale() then return 0 end
unindex_worker(worker_id)
forgive_worker(worker_id)
redis.call('DEL', PREFIX .. 'worker:' .. worker_id)
return 1
