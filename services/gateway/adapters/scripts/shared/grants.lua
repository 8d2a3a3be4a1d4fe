-- Grants: which job goes next, and how a slot is lent to it.

-- A call looks at this many jobs at most, so that it stays below a few milliseconds whatever has piled up.
local LOOKS_MAX = 64
-- One grant in so many looks at the bands from the bottom, so that the lowest never starves.
local BOTTOM_UP_EVERY = 8
-- A position is an estimate: beyond so many tenants with an older job, each counts for one job.
local TENANTS_COUNTED_MAX = 8
-- A mean service time that was not touched for an hour says nothing about now.
local STATS_TTL_S = 3600

-- The caller's grants of this call, each as JSON; those of other gateways are published to them.
local GRANTED = {}

local function encode_grant(job)
  return cjson.encode({
    job_id = job.id,
    attempt = tonumber(job.attempt),
    nonce = job.nonce,
    worker_id = job.worker,
    worker_address = job.address,
    revision = job.revision,
    -- As text: JSON numbers keep 14 digits here.
    epoch = job.epoch,
  })
end

-- The one place that chooses among the tenants of a band: the one whose oldest job came first.
local function choose_tenant(band)
  return redis.call('ZRANGE', PREFIX .. 'tenants:' .. band, 0, 0)[1]
end

local function bands_in_turn()
  local grants = tonumber(redis.call('HGET', PREFIX .. 'clock', 'grants') or 0)
  if (grants + 1) % BOTTOM_UP_EVERY ~= 0 then return BANDS end
  return { BANDS[3], BANDS[2], BANDS[1] }
end

-- Returns the oldest job among those whose pinned revision has a free worker, or nil.
local function next_pinned(view)
  local oldest, oldest_arrival
  for _, revision in ipairs(redis.call('SMEMBERS', PREFIX .. 'pins')) do
    local head = redis.call('ZRANGE', PREFIX .. 'pinned:' .. revision, 0, 0, 'WITHSCORES')
    if pick_worker(view, revision, '') and (not oldest or tonumber(head[2]) < oldest_arrival) then
      oldest, oldest_arrival = head[1], tonumber(head[2])
    end
  end
  return oldest
end

-- Returns the job that is next while a routed revision has a free worker, or nil. Any of these workers can
-- take any such job, so that nobody needs to look behind the head.
local function next_waiting(view)
  if not place_job(view, { id = '', pin = '', avoid = '' }) then return nil end
  for _, band in ipairs(bands_in_turn()) do
    local tenant = choose_tenant(band)
    if tenant then return redis.call('ZRANGE', PREFIX .. 'waiting:' .. band .. ':' .. tenant, 0, 0)[1] end
  end
end

local function grant_job(view, job)
  local worker, revision = place_job(view, job)
  take_waiting(job)
  job.state, job.worker, job.address, job.revision = 'running', worker.id, worker.address, revision
  job.attempt = tonumber(job.attempt) + 1
  job.epoch, job.granted_at = view.epoch, NOW
  -- The number makes it unique even if this call is repeated with its nonce.
  job.nonce = CALL_NONCE .. '.' .. next_number()
  worker.running = worker.running + 1
  store_job(job)
  put_running(job)
  redis.call('HINCRBY', PREFIX .. 'clock', 'grants', 1)
  if job.owner == CALLER then
    GRANTED[#GRANTED + 1] = encode_grant(job)
  else
    redis.call('PUBLISH', 'il:gateway:' .. job.owner, encode_grant(job))
  end
end

-- Lends every free slot. Returns the view of the workers, or nil if nobody waited.
local function grant_free()
  expire_overdue()
  local view
  for _ = 1, LOOKS_MAX do
    if count_waiting() == 0 then break end
    view = view or look_at_workers()
    local id = next_pinned(view) or next_waiting(view)
    if not id then break end
    local job = load_job(id)
    -- Left at the head, the job of a vanished gateway would block all behind it.
    if has_vanished(job.owner) then reap_job(job) else grant_job(view, job) end
  end
  return view
end

-- Returns the estimated number of jobs that start before this one.
local function position_of(job)
  if job.pin ~= '' then return redis.call('ZRANK', PREFIX .. 'pinned:' .. job.pin, job.id) end
  local ahead = 0
  for _, band in ipairs(BANDS) do
    if band > tonumber(job.band) then ahead = ahead + redis.call('ZCARD', PREFIX .. 'deadline:' .. band) end
  end
  local before, tenants_key = '(' .. job.arrival, PREFIX .. 'tenants:' .. job.band
  local tenants = redis.call('ZRANGEBYSCORE', tenants_key, '-inf', before, 'LIMIT', 0, TENANTS_COUNTED_MAX)
  for _, tenant in ipairs(tenants) do
    local waiting = PREFIX .. 'waiting:' .. job.band .. ':' .. tenant
    ahead = ahead + redis.call('ZCOUNT', waiting, '-inf', before)
  end
  ahead = ahead + redis.call('ZCOUNT', tenants_key, '-inf', before) - #tenants
  return ahead
end

-- Returns the estimated milliseconds until the job at this position starts; -1 while nothing was measured.
local function wait_of(position, slots)
  local service_ms = redis.call('HGET', PREFIX .. 'stats', 'service_ms')
  if not service_ms or slots == 0 then return -1 end
  return math.floor((position + 1) * tonumber(service_ms) / slots)
end

-- Takes a finished job's service time into the mean, a tenth of its weight at a time.
local function note_service(job)
  local took = NOW - tonumber(job.granted_at)
  local mean = tonumber(redis.call('HGET', PREFIX .. 'stats', 'service_ms') or took)
  redis.call('HSET', PREFIX .. 'stats', 'service_ms', string.format('%.3f', mean + 0.1 * (took - mean)))
  redis.call('EXPIRE', PREFIX .. 'stats', STATS_TTL_S)
end

-- Puts a job whose attempt ended back to its place, at its old arrival. The caller may repeat itself when
-- its answer was lost: the nonce of the attempt that ended is kept, and recognised. Returns 1 or 0.
local function put_back(id, nonce, prepare)
  local job = load_job(id)
  if is_current(job, nonce) then
    take_running(job)
    prepare(job)
    job.state, job.nonce, job.ended_nonce = 'waiting', '', nonce
    store_job(job)
    put_waiting(job)
    grant_free()
    return 1
  end
  local is_repeated = is_live(job) and job.owner == CALLER and job.ended_nonce == nonce
  grant_free()
  if is_repeated and job.state == 'running' then GRANTED[#GRANTED + 1] = encode_grant(job) end
  return is_repeated and 1 or 0
end
