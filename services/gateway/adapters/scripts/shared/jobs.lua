-- Jobs: their records, and the indices that a record stands in. Before it come clock.lua; after it
-- workers.lua, grants.lua and one operation.
--
-- KEYS[1] is the prefix of the model's keys, hash tag included; all other keys are derived from it and so lie
-- in the same Cluster slot. ARGV[1..5], the same for every operation:
--   gateway  nonce of this call  lease_ttl_ms  gateway_ttl_ms  record_ttl_ms

local PREFIX = KEYS[1]
local CALLER, CALL_NONCE = ARGV[1], ARGV[2]
local LEASE_MS, GATEWAY_MS, RECORD_MS = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])

-- Highest first; the values are those of the contract's priorities.
local BANDS = { 3, 2, 1 }
-- A call ends at most this many overdue jobs, so that it stays short; the next call goes on.
local OVERDUE_MAX = 32

-- Jobs of vanished gateways that this call made the caller's.
local ADOPTED = {}

local NOW = read_clock(PREFIX)

-- Every call is a sign of life of its gateway, not only a renewal.
redis.call('ZADD', PREFIX .. 'gateways', NOW, CALLER)

local function has_vanished(gateway)
  local seen = redis.call('ZSCORE', PREFIX .. 'gateways', gateway)
  return not seen or tonumber(seen) < NOW - GATEWAY_MS
end

-- Returns a number greater than all before it, as text: Lua's own conversion keeps 14 digits. Microseconds of the clock, not a counter: after Redis was
-- emptied a counter would begin again below the jobs that come back.
local function next_number()
  local last = tonumber(redis.call('HGET', PREFIX .. 'clock', 'number') or 0)
  local number = string.format('%.0f', math.max(NOW * 1000, last + 1))
  redis.call('HSET', PREFIX .. 'clock', 'number', number)
  return number
end

-- Returns the arrival number of a job that has waited so long already: its place among the others.
local function arrival_of(waited_ms)
  return string.format('%.0f', tonumber(next_number()) - waited_ms * 1000)
end

-- Returns the job's record with its id, or nil.
local function load_job(id)
  local flat = redis.call('HGETALL', PREFIX .. 'job:' .. id)
  if #flat == 0 then return nil end
  local job = { id = id }
  for i = 1, #flat, 2 do job[flat[i]] = flat[i + 1] end
  return job
end

local function store_job(job)
  local flat = {}
  for field, value in pairs(job) do
    if field ~= 'id' then
      flat[#flat + 1] = field
      flat[#flat + 1] = value
    end
  end
  redis.call('HSET', PREFIX .. 'job:' .. job.id, unpack(flat))
end

local function is_live(job)
  return job ~= nil and (job.state == 'waiting' or job.state == 'running')
end

-- Whether the nonce names the attempt that runs: numbers repeat after a loss in Redis, nonces do not.
local function is_current(job, nonce)
  return job ~= nil and job.state == 'running' and job.nonce == nonce
end

-- Tenants of a band are ranked by the arrival of their oldest job. Virtual counters would replace the score.
local function rank_tenant(band, tenant)
  local oldest = redis.call('ZRANGE', PREFIX .. 'waiting:' .. band .. ':' .. tenant, 0, 0, 'WITHSCORES')
  if oldest[1] then
    redis.call('ZADD', PREFIX .. 'tenants:' .. band, oldest[2], tenant)
  else
    redis.call('ZREM', PREFIX .. 'tenants:' .. band, tenant)
  end
end

-- A job with a pin must go on with that revision; its text began there.
local function put_waiting(job)
  if job.pin ~= '' then
    redis.call('ZADD', PREFIX .. 'pinned:' .. job.pin, job.arrival, job.id)
    redis.call('SADD', PREFIX .. 'pins', job.pin)
  else
    redis.call('ZADD', PREFIX .. 'waiting:' .. job.band .. ':' .. job.tenant, job.arrival, job.id)
    rank_tenant(job.band, job.tenant)
  end
  redis.call('ZADD', PREFIX .. 'deadline:' .. job.band, job.deadline, job.id)
  redis.call('ZADD', PREFIX .. 'lease', NOW + LEASE_MS, job.id)
  redis.call('HSET', PREFIX .. 'owned:' .. job.owner, job.id, '')
end

local function take_waiting(job)
  if job.pin ~= '' then
    redis.call('ZREM', PREFIX .. 'pinned:' .. job.pin, job.id)
    if redis.call('EXISTS', PREFIX .. 'pinned:' .. job.pin) == 0 then
      redis.call('SREM', PREFIX .. 'pins', job.pin)
    end
  else
    redis.call('ZREM', PREFIX .. 'waiting:' .. job.band .. ':' .. job.tenant, job.id)
    rank_tenant(job.band, job.tenant)
  end
  redis.call('ZREM', PREFIX .. 'deadline:' .. job.band, job.id)
end

-- Occupies a slot of job.worker under job.nonce.
local function put_running(job)
  redis.call('HSET', PREFIX .. 'running:' .. job.worker, job.id, job.nonce)
  redis.call('ZADD', PREFIX .. 'lease', NOW + LEASE_MS, job.id)
  redis.call('HSET', PREFIX .. 'owned:' .. job.owner, job.id, job.nonce)
end

local function take_running(job)
  redis.call('HDEL', PREFIX .. 'running:' .. job.worker, job.id)
end

-- The log of a resumable job outlives it, and so does the record, which knows of ends that the log does not.
local function keep_log(job)
  redis.call('HSET', PREFIX .. 'job:' .. job.id, 'digest', job.digest, 'keep_ms', job.keep_ms)
  redis.call('PEXPIRE', PREFIX .. 'job:' .. job.id, job.keep_ms)
  redis.call('PEXPIRE', PREFIX .. 'log:' .. job.id, job.keep_ms)
end

-- Ends a live job. Its record stays a while, so that a repeated call finds out how it ended.
local function finish_job(job, outcome)
  if job.state == 'waiting' then take_waiting(job) else take_running(job) end
  redis.call('ZREM', PREFIX .. 'lease', job.id)
  redis.call('HDEL', PREFIX .. 'owned:' .. job.owner, job.id)
  redis.call('DEL', PREFIX .. 'job:' .. job.id, PREFIX .. 'payload:' .. job.id)
  redis.call('HSET', PREFIX .. 'job:' .. job.id, 'state', outcome, 'submission', job.submission)
  redis.call('PEXPIRE', PREFIX .. 'job:' .. job.id, RECORD_MS)
  if job.keep_ms then keep_log(job) end
end

-- A job deep in a queue ends on time too: it is found by its deadline, not by its turn.
local function expire_overdue()
  for _, band in ipairs(BANDS) do
    local index = PREFIX .. 'deadline:' .. band
    for _, id in ipairs(redis.call('ZRANGEBYSCORE', index, '-inf', NOW, 'LIMIT', 0, OVERDUE_MAX)) do
      finish_job(load_job(id), 'expired')
    end
  end
end

local function count_waiting()
  local count = 0
  for _, band in ipairs(BANDS) do count = count + redis.call('ZCARD', PREFIX .. 'deadline:' .. band) end
  return count
end
