-- unready(fence, worker_id, revision, routed)
-- Takes a revision from a worker that is to unload it, if nobody can miss it: the route does not serve it
-- (unless `routed` is 1: then new requests wait), nothing runs on the worker with it, and nothing must go on
-- with it unless another worker holds it.
-- Returns 1; 0 if the fence is stale; -1 if it is still needed, and then nothing has changed.

local worker_id, revision, may_be_routed = ARGV[2], ARGV[3], ARGV[4] == '1'

local function is_routed()
  return tonumber(redis.call('HGET', PREFIX .. 'route', 'w:' .. revision) or 0) > 0
end

local function is_running()
  for _, id in ipairs(redis.call('HKEYS', PREFIX .. 'running:' .. worker_id)) do
    if redis.call('HGET', PREFIX .. 'job:' .. id, 'revision') == revision then return true end
  end
  return false
end

local function is_awaited()
  local holders = PREFIX .. 'holders:' .. revision
  local others = redis.call('SCARD', holders) - redis.call('SISMEMBER', holders, worker_id)
  return others == 0 and redis.call('EXISTS', PREFIX .. 'pinned:' .. revision) == 1
end

if is_stale() then return 0 end
if (is_routed() and not may_be_routed) or is_running() or is_awaited() then return -1 end
redis.call('HDEL', PREFIX .. 'worker:' .. worker_id, 'r:' .. revision)
redis.call('SREM', PREFIX .. 'holders:' .. revision, worker_id)
redis.call('ZREM', PREFIX .. 'free:' .. revision, worker_id)
return 1
