-- A call: who makes it, and when. Before it comes clock.lua; after it index.lua, tenants.lua, jobs.lua,
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

local NOW = read_clock(PREFIX)

-- Every call is a sign of life of its gateway, not only a renewal.
redis.call('ZADD', PREFIX .. 'gateways', NOW, CALLER)

local function has_vanished(gateway)
  if gateway == CALLER then return false end
  local seen = redis.call('ZSCORE', PREFIX .. 'gateways', gateway)
  return not seen or tonumber(seen) < NOW - GATEWAY_MS
end

-- The last one that this call has drawn.
local last_number

-- Returns a number greater than all before it, as text: Lua's own conversion keeps 14 digits. Microseconds of
-- the clock, not a counter: after Redis was emptied a counter would begin again below the jobs that come back.
local function next_number()
  last_number = last_number or tonumber(redis.call('HGET', PREFIX .. 'clock', 'number') or 0)
  last_number = math.max(NOW * 1000, last_number + 1)
  local number = string.format('%.0f', last_number)
  redis.call('HSET', PREFIX .. 'clock', 'number', number)
  return number
end

-- Returns the arrival number of a job that has waited so long already: its place among the others.
local function arrival_of(waited_ms)
  return string.format('%.0f', tonumber(next_number()) - waited_ms * 1000)
end

-- Changes a count in a hash; a count of nothing leaves no field behind. Returns the count.
local function add_count(key, field, delta)
  local count = redis.call('HINCRBY', PREFIX .. key, field, delta)
  if count == 0 then redis.call('HDEL', PREFIX .. key, field) end
  return count
end
