-- reap(pin_ms)
-- Takes over the resumable jobs that vanished gateways left behind, ends their other ones, and ends pinned
-- jobs whose revision nobody holds any more. The caller's own jobs are skipped: it may have slept, and is
-- about to renew them. Where the caller leaves, a gateway that stays takes over. Pinned jobs wait for pin_ms from
-- the last time that somebody was seen to hold the revision.
-- Returns {grants, job_ids that the caller adopted}: `take_up` tells what an adopted job is.

-- A call looks at this many jobs of each kind, so that it stays short after the loss of a large gateway.
local JOBS_MAX = 32
-- Gateways that were silent for a minute are no longer counted as members.
local GATEWAYS_KEPT_MS = 60000

local function reap_leases()
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', PREFIX .. 'lease', '-inf', NOW, 'LIMIT', 0, JOBS_MAX)) do
    local job = load_job(id)
    if job.owner ~= CALLER and has_vanished(job.owner) then reap_job(job) end
  end
end

local pin_ms = tonumber(ARGV[6])

local function is_held(revision)
  return redis.call('EXISTS', PREFIX .. 'holders:' .. revision) == 1
end

-- A worker that was lost may be on its way back with the revision, so that whoever is pinned to it waits a while
-- first, from when it was held last.
local function reap_pinned()
  local seen = PREFIX .. 'pins_held'
  redis.call('ZREMRANGEBYSCORE', seen, '-inf', NOW - pin_ms)
  for _, revision in ipairs(redis.call('SMEMBERS', PREFIX .. 'pins')) do
    if is_held(revision) then
      redis.call('ZADD', seen, NOW, revision)
    elseif not redis.call('ZSCORE', seen, revision) then
      -- Those behind them are looked at when these have gone.
      for _, id in ipairs(redis.call('ZRANGE', PREFIX .. 'pinned:' .. revision, 0, JOBS_MAX - 1)) do
        local job = load_job(id)
        if tonumber(job.pin_until) <= NOW then finish_job(job, 'failed') end
      end
    end
  end
end

-- Breakers of a gateway that is gone bar nobody.
local function forget_gateway(gateway)
  redis.call('ZREM', PREFIX .. 'gateways', gateway)
  for _, worker_id in ipairs(redis.call('SMEMBERS', PREFIX .. 'opened')) do close_pair(gateway, worker_id) end
end

-- A gateway that had not heard of a worker's end listed its breaker later.
local function forget_workers()
  for _, worker_id in ipairs(redis.call('SMEMBERS', PREFIX .. 'opened')) do
    if redis.call('EXISTS', PREFIX .. 'worker:' .. worker_id) == 0 then forgive_worker(worker_id) end
  end
end

local function forget_gateways()
  local gone = redis.call('ZRANGEBYSCORE', PREFIX .. 'gateways', '-inf', NOW - GATEWAYS_KEPT_MS, 'LIMIT', 0, JOBS_MAX)
  for _, gateway in ipairs(gone) do forget_gateway(gateway) end
end

reap_leases()
reap_pinned()
forget_gateways()
forget_workers()
prune_shares(JOBS_MAX)
-- Grants look at who is held while somebody waits.
release_held()
grant_free()
return { GRANTED, ADOPTED }
