-- look()
-- Tells what the controller wrote of one model: route, workers, and how many gateways share them. KEYS[1] is the
-- prefix of the model's keys. Reads only; no clock, so that it works while nothing may be written.
-- Returns {route fields, gateways, {worker_id, fields} ...}.

local prefix = KEYS[1]
local reply = { redis.call('HGETALL', prefix .. 'route'), redis.call('ZCARD', prefix .. 'gateways') }
for _, worker_id in ipairs(redis.call('SMEMBERS', prefix .. 'workers')) do
  reply[#reply + 1] = { worker_id, redis.call('HGETALL', prefix .. 'worker:' .. worker_id) }
end
return reply
