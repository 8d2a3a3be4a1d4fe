-- remove_worker(fence, worker_id)
-- Removes a worker's record, so that it gets no more jobs. What runs on it ends with its jobs' leases.
-- Returns 1, or 0 if the fence is stale.

if is_stale() then return 0 end
redis.call('DEL', PREFIX .. 'worker:' .. ARGV[2])
redis.call('SREM', PREFIX .. 'workers', ARGV[2])
return 1
