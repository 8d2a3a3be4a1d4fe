-- Resumable jobs: the log of their events, and how another gateway takes one over. Stands after jobs.lua.

-- Who read a log this long ago does not follow it any more; a follower looks every second.
local FOLLOWING_MS = 3000
-- The list of followers goes when nobody has looked for longer than a detached job may run by itself.
local FOLLOWERS_TTL_MS = 3600000
-- How many gateways are looked at for one that stays: a rolling update has no more of them leave at once.
local PEERS_MAX = 64

-- Notes at a new record what its job was asked, and keeps what another gateway needs to carry it on.
local function note_resumable(job, digest, payload, keep_ms)
  job.digest = digest
  if payload == '' then return end
  job.keep_ms = keep_ms
  local ttl_ms = math.max(tonumber(job.deadline) - NOW, 0) + tonumber(keep_ms)
  redis.call('SET', PREFIX .. 'payload:' .. job.id, payload, 'PX', string.format('%.0f', ttl_ms))
end

-- Sends a notice to a gateway. Like every message it may be lost, and is found again by looking.
local function notify(gateway, kind, id)
  redis.call('PUBLISH', 'il:gateway:' .. gateway, cjson.encode({ kind = kind, job_id = id, prefix = PREFIX }))
end

-- Clients of the caller itself read what it has at hand.
local function notify_followers(id)
  local followers = PREFIX .. 'followers:' .. id
  for _, gateway in ipairs(redis.call('ZRANGEBYSCORE', followers, NOW - FOLLOWING_MS, '+inf')) do
    if gateway ~= CALLER then notify(gateway, 'log', id) end
  end
end

-- Writes ARGV[first] and what follows it behind the first `position` events of the job's log: what stands
-- there already is not written again. Returns the log's end; nothing was written if it lies before `position`.
local function append_log(job, position, first)
  local log = PREFIX .. 'log:' .. job.id
  local finish = redis.call('LLEN', log)
  if position > finish then return finish end
  for i = first + finish - position, #ARGV do finish = redis.call('RPUSH', log, ARGV[i]) end
  local ttl_ms = math.max(tonumber(job.deadline) - NOW, 0) + tonumber(job.keep_ms)
  redis.call('PEXPIRE', log, string.format('%.0f', ttl_ms))
  notify_followers(job.id)
  return finish
end

-- Makes a gateway the owner of a live job. The job waits at its old place, pinned to the revision whose text
-- its log holds; its former owner's nonces mean nothing any more.
local function adopt_job(job, owner)
  if job.state == 'running' then
    take_back(job)
    if redis.call('EXISTS', PREFIX .. 'log:' .. job.id) == 1 then
      -- A worker that has the revision may be on its way back, as after a failure.
      job.pin, job.pin_until = job.revision, NOW + 3 * LEASE_MS
    end
  else
    take_waiting(job)
  end
  redis.call('HDEL', PREFIX .. 'owned:' .. job.owner, job.id)
  job.state, job.nonce, job.ended_nonce = 'waiting', '', ''
  job.owner, job.submission = owner, CALL_NONCE .. '/' .. next_number()
  job.adoptions, job.untaken = tonumber(job.adoptions or 0) + 1, '1'
  store_job(job)
  put_waiting(job)
end

-- Notes that the caller leaves: it is seen until it has gone, and a moment longer, and takes up nothing more.
local function note_leaving()
  redis.call('SET', PREFIX .. 'leaving:' .. CALLER, '1', 'PX', 2 * GATEWAY_MS)
end

local function is_leaving(gateway)
  return redis.call('EXISTS', PREFIX .. 'leaving:' .. gateway) == 1
end

-- Returns the gateway that was heard of last, of those that stay, or nil.
local function latest_staying()
  local gateways, since = PREFIX .. 'gateways', NOW - GATEWAY_MS
  for _, gateway in ipairs(redis.call('ZREVRANGEBYSCORE', gateways, '+inf', since, 'LIMIT', 0, PEERS_MAX)) do
    if not is_leaving(gateway) then return gateway end
  end
end

-- Makes another gateway the owner of a live job, and tells it.
local function hand_over(job, gateway)
  adopt_job(job, gateway)
  notify(gateway, 'take', job.id)
end

-- Makes the caller the owner of a live job, or another gateway where the caller leaves and one stays.
local function inherit_job(job)
  local heir = is_leaving(CALLER) and latest_staying()
  if heir then
    hand_over(job, heir)
  else
    adopt_job(job, CALLER)
    ADOPTED[#ADOPTED + 1] = job.id
  end
end

-- What becomes of the job of a vanished gateway: a resumable one gets another owner, any other one ends.
local function reap_job(job)
  if job.cancelled then
    finish_job(job, 'cancelled')
  elseif job.keep_ms and redis.call('EXISTS', PREFIX .. 'payload:' .. job.id) == 1 then
    inherit_job(job)
  else
    finish_job(job, 'failed')
  end
end
