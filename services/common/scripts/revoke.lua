-- Takes tokens back until their end.
-- KEYS[1] the set: token id by the second in which its entry may go
-- ARGV    now in seconds, most entries, then the end and the id of each token
-- Returns how many did not fit.
local now, most = tonumber(ARGV[1]), tonumber(ARGV[2])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
local left_out = 0
for at = 3, #ARGV, 2 do
  local known = redis.call('ZSCORE', KEYS[1], ARGV[at + 1])
  if known or redis.call('ZCARD', KEYS[1]) < most then
    redis.call('ZADD', KEYS[1], 'GT', ARGV[at], ARGV[at + 1])
  else
    left_out = left_out + 1
  end
end
local last = redis.call('ZRANGE', KEYS[1], -1, -1, 'WITHSCORES')
if last[2] then
  redis.call('EXPIREAT', KEYS[1], math.ceil(tonumber(last[2])))
end
return left_out
