-- take_lead(id, incarnation, ttl_ms, may_found, may_replace)
-- Gives a controller the lead of the model, if nobody else has it: the lease has ended, or is the caller's, or,
-- with `may_replace`, that of an earlier process of its id. Where no lease is known the store is new or has
-- lost its memory; then a leader may still be there, and only `may_found` lets the caller found one.
-- Returns {fencing number, id of the leader}; the number is 0 if the caller does not lead.

local id, incarnation = ARGV[1], ARGV[2]
local lead = redis.call('HMGET', PREFIX .. 'lead', 'id', 'incarnation', 'fence', 'end_ms')

local function is_free()
  if not lead[1] then return ARGV[4] == '1' end
  if lead[2] == incarnation or tonumber(lead[4]) <= NOW then return true end
  return lead[1] == id and ARGV[5] == '1'
end

if not is_free() then return { 0, lead[1] or '' } end
local written = tonumber(redis.call('HGET', PREFIX .. 'route', 'fence') or 0)
local fence = math.max(tonumber(lead[3] or 0), written) + 1
redis.call('HSET', PREFIX .. 'lead',
  'id', id, 'incarnation', incarnation, 'fence', fence, 'end_ms', NOW + tonumber(ARGV[3]))
return { fence, id }
