-- hold_breaker(target, state)
-- Holds the breakers of a target in a state; an empty one lets them go. KEYS[1] is the hash of all holds.
-- Returns 1.

if ARGV[2] == '' then
  redis.call('HDEL', KEYS[1], ARGV[1])
else
  redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
end
return 1
