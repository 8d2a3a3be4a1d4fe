-- Which model and which body a request id stands for. KEYS[1] is the id's own key; it lies in no model's slot.
-- where('claim', value, ttl_ms): returns what the id stands for already; else it stands for `value` now. Where it
-- stands for that, it does for so long from now on: another request may begin by it.
-- where('release', value): frees the id if it stands for `value`.

local known = redis.call('GET', KEYS[1])
if ARGV[1] == 'claim' then
  if not known then
    redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
  elseif known == ARGV[2] and redis.call('PTTL', KEYS[1]) < tonumber(ARGV[3]) then
    redis.call('PEXPIRE', KEYS[1], ARGV[3])
  end
elseif known == ARGV[2] then
  redis.call('DEL', KEYS[1])
end
return known or ''
