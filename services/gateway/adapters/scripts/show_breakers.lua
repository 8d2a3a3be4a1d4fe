-- show_breakers(ttl_ms, {target, json} ...)
-- Replaces what the fleet sees of one gateway's breakers; it vanishes when the gateway does. KEYS[1] is the
-- gateway's hash, KEYS[2] what operators hold.
-- Returns the holds, as a flat list of target and state.

redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], unpack(ARGV, 2))
redis.call('PEXPIRE', KEYS[1], ARGV[1])
return redis.call('HGETALL', KEYS[2])
