-- follow(job_id, after, count)
-- Reads a log behind its first `after` events. The caller is told of later ones while the job lives.
-- Returns {'unknown'} where the job is not or not resumable, or {state, digest, end, events}.

local id, after, count = ARGV[6], tonumber(ARGV[7]), tonumber(ARGV[8])

local log = PREFIX .. 'log:' .. id
local fields = redis.call('HMGET', PREFIX .. 'job:' .. id, 'state', 'digest', 'keep_ms')
if not fields[3] then return { 'unknown' } end

if is_live({ state = fields[1] }) then
  redis.call('ZADD', PREFIX .. 'followers:' .. id, NOW, CALLER)
  redis.call('PEXPIRE', PREFIX .. 'followers:' .. id, FOLLOWERS_TTL_MS)
end
return { fields[1], fields[2], redis.call('LLEN', log), redis.call('LRANGE', log, after, after + count - 1) }
