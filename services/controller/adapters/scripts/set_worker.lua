-- set_worker(fence, worker_id, address, incarnation, slots, draining, lease_ttl_ms, ready revision ...)
-- Replaces a worker's record and begins its lease anew. A worker that returns as a new process is suspect no
-- longer.
-- Returns 1, or 0 if the fence is stale.

local worker_id, address, incarnation, slots, draining = ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local lease_end_ms = NOW + tonumber(ARGV[7])

if is_stale() then return 0 end
local key = PREFIX .. 'worker:' .. worker_id
if redis.call('HGET', key, 'incarnation') ~= incarnation then forgive_worker(worker_id) end
unindex_worker(worker_id)
redis.call('DEL', key)
redis.call('HSET', key, 'address', address, 'incarnation', incarnation, 'slots', slots,
  'draining', draining, 'lease_end_ms', lease_end_ms)
for i = 8, #ARGV do redis.call('HSET', key, 'r:' .. ARGV[i], 1) end
enlist_worker(worker_id)
return 1
