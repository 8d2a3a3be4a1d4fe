-- The fence of the controller's writes. clock.lua stands before it, index.lua and one operation after it.
--
-- KEYS[1] is the prefix of the model's keys, hash tag included; all other keys are derived from it and so lie
-- in the same Cluster slot. ARGV[1] is the writer's fencing number.

local PREFIX = KEYS[1]
local NOW = read_clock(PREFIX)

-- Whether a controller with a higher number leads or has written. The highest one is kept, so that a controller
-- that slept while another took over changes nothing when it wakes.
local function is_stale()
  local written = tonumber(redis.call('HGET', PREFIX .. 'route', 'fence') or 0)
  local fence = math.max(written, tonumber(redis.call('HGET', PREFIX .. 'lead', 'fence') or 0))
  if tonumber(ARGV[1]) < fence then return true end
  redis.call('HSET', PREFIX .. 'route', 'fence', ARGV[1])
  return false
end
