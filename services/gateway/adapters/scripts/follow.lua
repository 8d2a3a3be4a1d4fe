-- follow(job_id, after, count, expects_route)
-- Reads a log behind its first `after` events. The caller is told of later ones while the job lives.
-- Returns {'unknown'} where the job is not or not resumable, or {state, digest, end, events}. {'emptied'} where
-- the job is not, and neither is a route that the caller knows of: what was lost is not written again before that.

local id, after, count, expects_route = ARGV[6], tonumber(ARGV[7]), tonumber(ARGV[8]), ARGV[9] == '1'

local log = PREFIX .. 'log:' .. id
local fields = redis.call('HMGET', PREFIX .. 'job:' .. id, 'state', 'digest', 'keep_ms')
if not fields[3] then return { expects_route and not has_route() and 'emptied' or 'unknown' } end

if is_live({ state = fields[1] }) then
  redis.call('ZADD', PREFIX .. 'followers:' .. id, NOW, CALLER)
  redis.call('PEXPIRE', PREFIX .. 'followers:' .. id, FOLLOWERS_TTL_MS)
end
return { fields[1], fields[2], redis.call('LLEN', log), redis.call('LRANGE', log, after, after + count - 1) }
