-- keep_lead(id, incarnation, ttl_ms, fence)
-- Renews the caller's lease, which bears `fence` from now on. A lease that has ended and that nobody took is
-- still the caller's, and one that the store has forgotten is founded again.
-- Returns 1, or 0 if another controller leads, or the caller itself with a higher number.

local lead = redis.call('HMGET', PREFIX .. 'lead', 'incarnation', 'fence')
if lead[1] and (lead[1] ~= ARGV[2] or tonumber(lead[2]) > tonumber(ARGV[4])) then return 0 end
redis.call('HSET', PREFIX .. 'lead',
  'id', ARGV[1], 'incarnation', ARGV[2], 'fence', ARGV[4], 'end_ms', NOW + tonumber(ARGV[3]))
return 1
