-- leave_lead(incarnation)
-- Ends the caller's lease; the number stays, so that the next one is above it. Returns 1, or 0 if it had none.

if redis.call('HGET', PREFIX .. 'lead', 'incarnation') ~= ARGV[1] then return 0 end
redis.call('HSET', PREFIX .. 'lead', 'end_ms', 0)
return 1
