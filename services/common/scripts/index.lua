-- The indices over a model's workers. Whoever changes a record, a load or a hold calls index_worker, the
-- controller's scripts too, so that no script has to look at all workers. Before it come clock.lua, PREFIX and
-- NOW.
--
--   free:<revision>     workers that are ready for it, take jobs and have a free slot, by their load
--   holders:<revision>  workers that are ready for it, whatever else they are
--   takers              workers that take jobs, with or without a free slot, by the end of their lease
--   expiry              all workers, by the end of their lease
--   held                suspects, by the end of the suspicion
--   lapsed              workers that were left out because their lease had lapsed
--   fleet               slots: of all workers that are not draining

local function load_worker(worker_id)
  local flat = redis.call('HGETALL', PREFIX .. 'worker:' .. worker_id)
  local worker = { id = worker_id, ready = {} }
  for i = 1, #flat, 2 do
    if string.sub(flat[i], 1, 2) == 'r:' then
      worker.ready[#worker.ready + 1] = string.sub(flat[i], 3)
    else
      worker[flat[i]] = flat[i + 1]
    end
  end
  worker.slots = tonumber(worker.slots or 0)
  return worker
end

local function index_worker(worker_id)
  local worker = load_worker(worker_id)
  local takes = worker.draining == '0' and not redis.call('ZSCORE', PREFIX .. 'held', worker_id)
  if takes then
    redis.call('ZADD', PREFIX .. 'takers', worker.lease_end_ms, worker_id)
  else
    redis.call('ZREM', PREFIX .. 'takers', worker_id)
  end
  local running = redis.call('HLEN', PREFIX .. 'running:' .. worker_id)
  for _, revision in ipairs(worker.ready) do
    if takes and running < worker.slots then
      redis.call('ZADD', PREFIX .. 'free:' .. revision, running / worker.slots, worker_id)
    else
      redis.call('ZREM', PREFIX .. 'free:' .. revision, worker_id)
    end
  end
end

local function open_slots(worker)
  return worker.draining == '0' and worker.slots or 0
end

-- Takes a worker out of every index, as its record stands.
local function unindex_worker(worker_id)
  local worker = load_worker(worker_id)
  for _, revision in ipairs(worker.ready) do
    redis.call('ZREM', PREFIX .. 'free:' .. revision, worker_id)
    redis.call('SREM', PREFIX .. 'holders:' .. revision, worker_id)
  end
  for _, index in ipairs({ 'takers', 'expiry' }) do redis.call('ZREM', PREFIX .. index, worker_id) end
  redis.call('SREM', PREFIX .. 'lapsed', worker_id)
  redis.call('SREM', PREFIX .. 'workers', worker_id)
  redis.call('HINCRBY', PREFIX .. 'fleet', 'slots', -open_slots(worker))
end

-- Puts a worker into every index, as its record stands.
local function enlist_worker(worker_id)
  local worker = load_worker(worker_id)
  for _, revision in ipairs(worker.ready) do
    redis.call('SADD', PREFIX .. 'holders:' .. revision, worker_id)
  end
  redis.call('ZADD', PREFIX .. 'expiry', worker.lease_end_ms, worker_id)
  redis.call('SADD', PREFIX .. 'workers', worker_id)
  redis.call('HINCRBY', PREFIX .. 'fleet', 'slots', open_slots(worker))
  index_worker(worker_id)
end

-- A worker that comes back as a new process is neither suspect nor kept behind an open breaker; who forced one
-- open meant the worker, not its process.
local function forgive_worker(worker_id)
  redis.call('ZREM', PREFIX .. 'held', worker_id)
  local key = PREFIX .. 'open:' .. worker_id
  local pairs_flat = redis.call('HGETALL', key)
  for i = 1, #pairs_flat, 2 do
    if pairs_flat[i + 1] ~= 'forced' then redis.call('HDEL', key, pairs_flat[i]) end
  end
  if redis.call('EXISTS', key) == 0 then redis.call('SREM', PREFIX .. 'opened', worker_id) end
end
