-- release(job_id, submission)
-- Hands a resumable job of the caller, which is leaving, to the gateway that was heard of last.
-- Returns {1 | 0, grants}: whether there was one to take it.

local id, submission = ARGV[6], ARGV[7]

-- How many gateways are looked at: more do not leave at once while one stays.
local PEERS_MAX = 8

-- A gateway that leaves is seen for a moment after its last call, and must not be given anything any more.
redis.call('SET', PREFIX .. 'leaving:' .. CALLER, '1', 'PX', 2 * GATEWAY_MS)

local function latest_peer()
  local gateways, since = PREFIX .. 'gateways', NOW - GATEWAY_MS
  for _, gateway in ipairs(redis.call('ZREVRANGEBYSCORE', gateways, '+inf', since, 'LIMIT', 0, PEERS_MAX)) do
    if redis.call('EXISTS', PREFIX .. 'leaving:' .. gateway) == 0 then return gateway end
  end
end

local job, peer = load_job(id), latest_peer()
local is_mine = is_live(job) and job.owner == CALLER and job.submission == submission
local has_payload = redis.call('EXISTS', PREFIX .. 'payload:' .. id) == 1
local released = is_mine and peer and has_payload
if released then
  adopt_job(job, peer)
  notify(peer, 'take', id)
end
grant_free()
return { released and 1 or 0, GRANTED }
