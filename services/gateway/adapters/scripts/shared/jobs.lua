-- Jobs: their records, and the indices that a record stands in. A job's band is the one it counts in: one
-- higher than it asked for while it is lifted.

-- A call ends at most this many overdue jobs, so that it stays short; the next call goes on.
local OVERDUE_MAX = 32
-- And it looks at so many tenants for jobs that have aged.
local AGED_MAX = 16
-- So many leases are written at once: what Lua can hand over in one go is bounded.
local LEASES_AT_ONCE = 500

-- Jobs of vanished gateways that this call made the caller's.
local ADOPTED = {}

-- Returns the job's record with its id, or nil.
local function load_job(id)
  local flat = redis.call('HGETALL', PREFIX .. 'job:' .. id)
  if #flat == 0 then return nil end
  local job = { id = id }
  for i = 1, #flat, 2 do job[flat[i]] = flat[i + 1] end
  return job
end

-- Returns the named fields of the job's record with its id; those that it lacks are false.
local function read_job(id, ...)
  local values = redis.call('HMGET', PREFIX .. 'job:' .. id, ...)
  local job = { id = id }
  for i, field in ipairs({ ... }) do job[field] = values[i] end
  return job
end

local function store_job(job)
  local flat = {}
  for field, value in pairs(job) do
    if field ~= 'id' then
      flat[#flat + 1] = field
      flat[#flat + 1] = value
    end
  end
  redis.call('HSET', PREFIX .. 'job:' .. job.id, unpack(flat))
end

-- Stores the named fields of a job whose record is there.
local function store_fields(job, names)
  local flat = {}
  for _, field in ipairs(names) do
    if job[field] then
      flat[#flat + 1] = field
      flat[#flat + 1] = job[field]
    end
  end
  redis.call('HSET', PREFIX .. 'job:' .. job.id, unpack(flat))
end

local function is_live(job)
  return job ~= nil and (job.state == 'waiting' or job.state == 'running')
end

-- Whether the nonce names the attempt that runs: numbers repeat after a loss in Redis, nonces do not.
local function is_current(job, nonce)
  return job ~= nil and job.state == 'running' and job.nonce == nonce
end

-- Prolongs the leases of jobs, however many.
local function prolong(ids)
  local lease_end = string.format('%.0f', NOW + LEASE_MS)
  for first = 1, #ids, LEASES_AT_ONCE do
    local flat = {}
    for i = first, math.min(first + LEASES_AT_ONCE - 1, #ids) do
      flat[#flat + 1] = lease_end
      flat[#flat + 1] = ids[i]
    end
    redis.call('ZADD', PREFIX .. 'lease', unpack(flat))
  end
end

-- A job with a pin must go on with its revision, since its text began there; the others wait for the turn of
-- their tenant.
local function put_in_line(job)
  if job.pin ~= '' then
    redis.call('ZADD', PREFIX .. 'pinned:' .. job.pin, job.arrival, job.id)
    redis.call('SADD', PREFIX .. 'pins', job.pin)
    return
  end
  local line = PREFIX .. 'waiting:' .. job.band .. ':' .. job.tenant
  if redis.call('EXISTS', line) == 0 then enter_band(job.band, job.tenant) end
  redis.call('ZADD', line, job.arrival, job.id)
  -- The tenant's turn is that of its oldest job.
  if redis.call('ZRANK', line, job.id) == 0 then rank_tenant(job.band, job.tenant) end
  if job.aged == '1' then note_lifted(job) end
end

-- Returns the oldest job of a tenant that waits for its turn in a band, or nil.
local function oldest_of(band, tenant)
  return redis.call('ZRANGE', PREFIX .. 'waiting:' .. band .. ':' .. tenant, 0, 0)[1]
end

local function slots_of(job)
  return tonumber(job.slots or 1)
end

-- Notes that the job's turn has come, and that it waits for slots. One job is due at a time.
local function note_due(job)
  redis.call('SET', PREFIX .. 'due', job.id, 'NX')
end

local function forget_due(job)
  if slots_of(job) > 1 and redis.call('GET', PREFIX .. 'due') == job.id then redis.call('DEL', PREFIX .. 'due') end
end

-- How many jobs wait, once it was asked.
local waiting_count

local function count_waiting()
  if not waiting_count then
    waiting_count = 0
    for _, band in ipairs(BANDS) do waiting_count = waiting_count + redis.call('ZCARD', PREFIX .. 'deadline:' .. band) end
  end
  return waiting_count
end

local function put_waiting(job)
  waiting_count = count_waiting() + 1
  add_count('tenant:' .. job.tenant, 'waiting', 1)
  add_count('backlog', job.band, job.cost)
  put_in_line(job)
  redis.call('ZADD', PREFIX .. 'deadline:' .. job.band, job.deadline, job.id)
  redis.call('ZADD', PREFIX .. 'lease', NOW + LEASE_MS, job.id)
  redis.call('HSET', PREFIX .. 'owned:' .. job.owner, job.id, '')
end

local function take_waiting(job)
  waiting_count = count_waiting() - 1
  forget_due(job)
  add_count('tenant:' .. job.tenant, 'waiting', -1)
  add_count('backlog', job.band, -job.cost)
  if job.pin ~= '' then
    redis.call('ZREM', PREFIX .. 'pinned:' .. job.pin, job.id)
    if redis.call('EXISTS', PREFIX .. 'pinned:' .. job.pin) == 0 then
      redis.call('SREM', PREFIX .. 'pins', job.pin)
    end
  else
    redis.call('ZREM', PREFIX .. 'waiting:' .. job.band .. ':' .. job.tenant, job.id)
    -- A gateway of an earlier version lists here what it lifts, and takes it for waiting.
    redis.call('ZREM', PREFIX .. 'aging:' .. job.band, job.id)
    if job.aged == '1' then forget_lifted(job) end
    rank_tenant(job.band, job.tenant)
  end
  redis.call('ZREM', PREFIX .. 'deadline:' .. job.band, job.id)
end

-- Notes what a job has used so far; what was noted before does not become less. Most jobs lose no worker, and
-- their records do not say so.
local function note_used(job, tokens)
  if tokens > tonumber(job.used or 0) then job.used = tokens end
end

-- Returns the fields of running:<worker> that the job has: one for each of its slots, so that their number is
-- the worker's load.
local function slot_fields(job)
  local names = { job.id }
  for i = 2, slots_of(job) do names[i] = job.id .. '#' .. i end
  return names
end

-- Occupies the job's slots of job.worker under job.nonce.
local function put_running(job)
  for _, name in ipairs(slot_fields(job)) do
    redis.call('HSET', PREFIX .. 'running:' .. job.worker, name, job.nonce)
  end
  index_worker(job.worker)
  count_running(job.tenant, 1)
  redis.call('ZADD', PREFIX .. 'lease', NOW + LEASE_MS, job.id)
  redis.call('HSET', PREFIX .. 'owned:' .. job.owner, job.id, job.nonce)
end

local function take_running(job)
  redis.call('HDEL', PREFIX .. 'running:' .. job.worker, unpack(slot_fields(job)))
  index_worker(job.worker)
  count_running(job.tenant, -1)
end

-- Lets a job count in another band; it stands in no line meanwhile.
local function change_band(job, band)
  count_live(job.band, -1)
  job.band, job.aged = band, band == AGED_BAND and '1' or '0'
  count_live(band, 1)
end

-- Takes a job out of its slots that goes on elsewhere, and its charge back. One that was lifted is so no more: of
-- several that come back at once, one alone may be.
local function take_back(job)
  take_running(job)
  correct_charge(job, 0)
  if job.aged == '1' then change_band(job, AGING_BAND) end
end

-- Takes in a new job: its tokens are reserved, and its tenant's cap is as it says.
local function admit_job(job)
  set_cap(job.tenant, job.cap)
  book_tokens(job.tenant, tonumber(job.cost), 0)
  count_live(job.band, 1)
end

-- The tenant's side of a job's end: charge, quota and counts.
local function release_job(job, used_tokens)
  correct_charge(job, used_tokens)
  book_tokens(job.tenant, -tonumber(job.cost), used_tokens)
  count_live(job.band, -1)
  local counts = redis.call('HMGET', tenant_key(job.tenant), 'waiting', 'running')
  if not counts[1] and not counts[2] then redis.call('DEL', tenant_key(job.tenant)) end
end

-- The log of a resumable job outlives it, and so does the record, which knows of ends that the log does not.
local function keep_log(job)
  redis.call('HSET', PREFIX .. 'job:' .. job.id, 'digest', job.digest, 'keep_ms', job.keep_ms)
  redis.call('PEXPIRE', PREFIX .. 'job:' .. job.id, job.keep_ms)
  redis.call('PEXPIRE', PREFIX .. 'log:' .. job.id, job.keep_ms)
end

-- Ends a live job that has used so many tokens, or as many as were noted before. Its record stays a while, so
-- that a repeated call finds out how it ended.
local function finish_job(job, outcome, used_tokens)
  note_used(job, used_tokens or 0)
  local used = tonumber(job.used or 0)
  if job.state == 'waiting' then
    take_waiting(job)
    -- The charge of its last grant was taken back when its worker was lost.
    if used > 0 then charge_waiting(job, used) end
  else
    take_running(job)
  end
  release_job(job, used)
  redis.call('ZREM', PREFIX .. 'lease', job.id)
  redis.call('HDEL', PREFIX .. 'owned:' .. job.owner, job.id)
  redis.call('DEL', PREFIX .. 'job:' .. job.id, PREFIX .. 'payload:' .. job.id)
  store_job({ id = job.id, state = outcome, submission = job.submission, used = used, stopped_by = job.stopped_by })
  redis.call('PEXPIRE', PREFIX .. 'job:' .. job.id, RECORD_MS)
  if job.keep_ms then keep_log(job) end
end

-- A job deep in a queue ends on time too: it is found by its deadline, not by its turn.
local function expire_overdue()
  if count_waiting() == 0 then return end
  for _, band in ipairs(BANDS) do
    local index = PREFIX .. 'deadline:' .. band
    for _, id in ipairs(redis.call('ZRANGEBYSCORE', index, '-inf', NOW, 'LIMIT', 0, OVERDUE_MAX)) do
      finish_job(load_job(id), 'expired')
    end
  end
end

-- Lets a waiting job count in another band, at its old place there.
local function move_waiting(job, band)
  take_waiting(job)
  change_band(job, band)
  store_fields(job, { 'band', 'aged' })
  put_waiting(job)
end

-- A job of the lowest band that has waited long counts one band higher: of each tenant its oldest, and that only
-- while no other one of the tenant waits there. So an old backlog is never before what the tenant asks for now.
local function lift_aged()
  for _, seat in ipairs(redis.call('ZRANGE', PREFIX .. 'tenants:' .. AGING_BAND, 0, AGED_MAX - 1)) do
    local tenant = tenant_of(seat)
    if redis.call('EXISTS', PREFIX .. 'waiting:' .. AGED_BAND .. ':' .. tenant) == 0 then
      local oldest = read_job(oldest_of(AGING_BAND, tenant), 'ages_at')
      if tonumber(oldest.ages_at) <= NOW then move_waiting(load_job(oldest.id), AGED_BAND) end
    end
  end
end
