-- Grants: which job goes next, and how slots are lent to it.

-- A call grants this many jobs at most, and looks at as many for each, so that it stays below a few milliseconds
-- whatever has piled up.
local LOOKS_MAX = 64
-- Of so many grants one begins with the lowest band and another with the one above it, so that neither starves.
local TURNS = 8
local EARLY = { [0] = { 1, 2, 3 }, [4] = { 2, 3, 1 } }
-- While breakers are open, a job may be barred from all free workers; then at most this many are looked at.
local BARRED_LOOKS_MAX = 16
-- Behind a job that finds no place, so many are looked at of one tenant, and so many tenants.
local DEPTH_MAX = 16
-- A place is counted anew so many times, until it does not change any more.
local RECOUNTS_MAX = 16
-- What a grant changes of a job's record.
local GRANT_FIELDS = {
  'state', 'worker', 'revision', 'address', 'attempt', 'epoch', 'granted_at', 'trial', 'nonce', 'charged', 'entry',
}
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
    trial = job.trial == '1',
  })
end

local function bands_in_turn()
  local grants = tonumber(redis.call('HGET', PREFIX .. 'clock', 'grants') or 0)
  return EARLY[(grants + 1) % TURNS] or BANDS
end

-- Returns the job and its place if a worker can take it, or nil.
local function try_place(view, job)
  local worker_id, revision, is_trial = place_job(view, job)
  if worker_id then return job, { worker_id = worker_id, revision = revision, is_trial = is_trial } end
end

local function has_free(revision)
  return redis.call('EXISTS', PREFIX .. 'free:' .. revision) == 1
end

-- Returns the oldest pinned job whose revision has a free worker, and its place, or nil.
local function next_pinned(view)
  local line, arrivals = {}, {}
  for _, revision in ipairs(redis.call('SMEMBERS', PREFIX .. 'pins')) do
    local pinned = PREFIX .. 'pinned:' .. revision
    local flat = has_free(revision) and redis.call('ZRANGE', pinned, 0, DEPTH_MAX - 1, 'WITHSCORES') or {}
    for i = 1, #flat, 2 do line[#line + 1], arrivals[flat[i]] = flat[i], tonumber(flat[i + 1]) end
  end
  table.sort(line, function(a, b) return arrivals[a] < arrivals[b] end)
  for _, id in ipairs(line) do
    local job, place = try_place(view, load_job(id))
    if job then return job, place end
  end
end

-- Whether a revision of the route has a free worker. Most calls of a full mesh end here.
local function has_free_routed(view)
  for _, revision in ipairs(view.routed) do
    if has_free(revision.name) then return true end
  end
  return false
end

-- Returns the members of a sorted set one by one, a few at most, behind `first` where there is one. Most callers
-- want the first alone.
local function in_order(key, first)
  local rank = first and -2 or -1
  return function()
    rank = rank + 1
    if rank == -1 then return first end
    return rank < DEPTH_MAX and redis.call('ZRANGE', key, rank, rank)[1] or nil
  end
end

-- Returns the job that stands in line if a worker can take it, and its place, or nil. Where no breaker is open,
-- whoever needs as many slots as one that found none finds none either, and need not be looked at closely: so
-- a line of large jobs does not hide the small ones behind it, and behind one of one slot nobody is looked for.
local function try_in_line(view, id)
  view.looks_left = view.looks_left - 1
  if view.vain_slots and slots_of(read_job(id, 'slots')) >= view.vain_slots then return nil end
  local waiting = load_job(id)
  local job, place = try_place(view, waiting)
  if job then return job, place end
  if not view.has_open then view.vain_slots = slots_of(waiting) end
  if view.vain_slots == 1 then view.looks_left = 0 end
end

-- Returns the job that was due before, if a worker can take it now, and its place, or nil.
local function next_due(view)
  local id = redis.call('GET', PREFIX .. 'due')
  if not id then return nil end
  local job = read_job(id, 'state', 'band', 'tenant')
  -- A gateway of an earlier version does not know of it, and leaves the name of a job that waits no more.
  if job.state ~= 'waiting' then
    redis.call('DEL', PREFIX .. 'due')
    return nil
  end
  local _, left = seat_of(job.band, job.tenant)
  if left ~= 0 then return try_in_line(view, id) end
end

-- Returns the seats of tenants of which no job of the lowest band is in line but a lifted one, a few at most, and
-- their counters: what they would be if it came back.
local function lifted_seats()
  local seats, counters, floor = {}, {}, tonumber(redis.call('HGET', PREFIX .. 'floors', AGING_BAND) or 0)
  for _, seat in ipairs(redis.call('ZRANGE', PREFIX .. 'tenants:lifted', 0, DEPTH_MAX - 1)) do
    local tenant = tenant_of(seat)
    if lifted_from(AGING_BAND, tenant) then
      local own = tonumber(redis.call('ZSCORE', PREFIX .. 'served:' .. AGING_BAND, tenant) or floor)
      seats[#seats + 1], counters[seat] = seat, math.max(own, floor)
    else
      redis.call('ZREM', PREFIX .. 'tenants:lifted', seat)
    end
  end
  return seats, counters
end

-- Returns the seats of a band one by one, a few at most, as their turn is.
local function seats_in_turn(band)
  local seats, counters = {}, {}
  if band == AGING_BAND then seats, counters = lifted_seats() end
  if #seats == 0 then return in_order(PREFIX .. 'tenants:' .. band) end
  local flat = redis.call('ZRANGE', PREFIX .. 'tenants:' .. band, 0, DEPTH_MAX - 1, 'WITHSCORES')
  for i = 1, #flat, 2 do seats[#seats + 1], counters[flat[i]] = flat[i], tonumber(flat[i + 1]) end
  table.sort(seats, function(a, b)
    if counters[a] ~= counters[b] then return counters[a] < counters[b] end
    return a < b
  end)
  local rank = 0
  return function()
    rank = rank + 1
    return rank <= DEPTH_MAX and seats[rank] or nil
  end
end

-- Returns the job whose turn it is and its place, or nil: the one that is due; by band, by tenant, the oldest.
local function next_in_line(view)
  if not has_free_routed(view) then return nil end
  view.looks_left, view.vain_slots = view.has_open and BARRED_LOOKS_MAX or LOOKS_MAX, nil
  local due, due_place = next_due(view)
  if due then return due, due_place end
  for _, number in ipairs(bands_in_turn()) do
    local band = tostring(number)
    for seat in seats_in_turn(band) do
      local tenant = tenant_of(seat)
      -- A lifted job stays the first of its tenant in the turn of its own band too.
      for id in in_order(PREFIX .. 'waiting:' .. band .. ':' .. tenant, lifted_from(band, tenant)) do
        if view.looks_left == 0 then return nil end
        local job, place = try_in_line(view, id)
        if job and job.band ~= band then move_waiting(job, band) end
        if job then return job, place end
      end
    end
  end
end

local function grant_job(view, job, place)
  charge_grant(job)
  take_waiting(job)
  job.state, job.worker, job.revision = 'running', place.worker_id, place.revision
  job.address = redis.call('HGET', PREFIX .. 'worker:' .. place.worker_id, 'address')
  job.attempt = tonumber(job.attempt) + 1
  job.epoch, job.granted_at, job.trial = view.epoch, NOW, place.is_trial and '1' or '0'
  -- The number makes it unique even if this call is repeated with its nonce.
  job.nonce = CALL_NONCE .. '.' .. next_number()
  if place.is_trial then note_trial(job.owner, place.worker_id) end
  store_fields(job, GRANT_FIELDS)
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
  if count_waiting() == 0 then return nil end
  expire_overdue()
  lift_aged()
  local view
  for _ = 1, LOOKS_MAX do
    if count_waiting() == 0 then break end
    view = view or look_at_workers()
    view.kept_free = {}
    local job, place = next_pinned(view)
    if not job then job, place = next_in_line(view) end
    if not job then break end
    -- Left at the head, the job of a vanished gateway would block all behind it.
    if has_vanished(job.owner) then reap_job(job) else grant_job(view, job, place) end
  end
  return view
end

-- Returns mean milliseconds of slots and mean estimated tokens of the jobs that finished, or nil while none has.
local function read_means()
  local means = redis.call('HMGET', PREFIX .. 'stats', 'service_ms', 'service_tokens')
  if means[1] then return tonumber(means[1]), tonumber(means[2]) end
end

-- Returns what the estimates of one call have in common: means, slots, and bands and tenants as they are looked
-- at. It holds until a job is granted or put in line.
local function survey()
  local service_ms, service_tokens = read_means()
  return { service_ms = service_ms, service_tokens = service_tokens, slots = count_slots(), bands = {}, tenants = {} }
end

-- Returns milliseconds that a slot is taken by so many estimated tokens, by the means of the jobs that finished.
local function service_of(seen, tokens)
  return seen.service_ms and tonumber(tokens) * seen.service_ms / seen.service_tokens or 0
end

-- Returns milliseconds until a job starts that has so many estimated tokens before it; -1 while nothing was
-- measured.
local function wait_of(seen, tokens)
  if not seen.service_ms or seen.slots == 0 then return -1 end
  return math.floor((service_of(seen, tokens) + seen.service_ms) / seen.slots)
end

-- Returns the tenants of a band that have a seat, and its jobs that wait and their tokens.
local function look_at_band(seen, band)
  local found = seen.bands[band]
  if not found then
    found = {
      seats = redis.call('ZCARD', PREFIX .. 'tenants:' .. band),
      jobs = redis.call('ZCARD', PREFIX .. 'deadline:' .. band),
      tokens = tonumber(redis.call('HGET', PREFIX .. 'backlog', band) or 0),
    }
    seen.bands[band] = found
  end
  return found
end

local function count_in_line(band, tenant)
  return redis.call('ZCARD', PREFIX .. 'waiting:' .. band .. ':' .. tenant)
end

-- Returns the tenants in line in a band that may run few jobs at once: a few of them, those that were served most.
local function capped_in(band)
  local capped = {}
  for _, tenant in ipairs(redis.call('ZREVRANGE', PREFIX .. 'served:' .. band, 0, DEPTH_MAX - 1)) do
    local _, free, cap = seat_of(band, tenant)
    local jobs = cap and count_in_line(band, tenant) or 0
    if jobs > 0 then capped[#capped + 1] = { tenant = tenant, jobs = jobs, free = free, cap = cap } end
  end
  return capped
end

-- Returns the bands above one in which jobs wait, and which of their tenants may run few at once.
local function look_above(seen, band)
  local above = {}
  for _, other in ipairs(BANDS) do
    local found = other > tonumber(band) and look_at_band(seen, tostring(other))
    if found and found.jobs > 0 then
      found.capped = found.capped or capped_in(other)
      above[#above + 1] = found
    end
  end
  return above
end

-- Returns how many jobs of a higher band start while so many start in all. A tenant that may run few at once begins
-- another one where one of its own ends; the tenant of the job that waits begins all of them before it.
local function count_starts(seen, found, tenant, starts)
  local jobs = found.jobs
  for _, other in ipairs(found.capped) do
    local begun = other.free + math.ceil(other.cap * starts / seen.slots)
    if other.tenant ~= tenant then jobs = jobs - math.max(0, other.jobs - begun) end
  end
  return jobs
end

-- Returns how many jobs of higher bands start before one that has so many before it in its own, and their tokens.
-- How many there are depends on how many start in all: they are counted anew from all of them down, and so never
-- to too few.
local function count_above(seen, job, before)
  local above, counts, ahead, tokens = look_above(seen, job.band), {}, before, 0
  for i, found in ipairs(above) do counts[i], ahead = found.jobs, ahead + found.jobs end
  for _ = 1, seen.slots > 0 and RECOUNTS_MAX or 0 do
    local fewer = before
    for i, found in ipairs(above) do
      counts[i] = count_starts(seen, found, job.tenant, ahead + 1)
      fewer = fewer + counts[i]
    end
    if fewer == ahead then break end
    ahead = fewer
  end
  for i, found in ipairs(above) do tokens = tokens + math.floor(counts[i] * found.tokens / found.jobs) end
  return ahead - before, tokens
end

-- Returns how many tenants of the job's band come before its own, and what its own may run; where that is bounded
-- also how many of its jobs are in line above.
local function look_at_tenant(seen, job)
  local name = job.band .. ':' .. job.tenant
  local found = seen.tenants[name]
  if not found then
    local seat, free, cap = seat_of(job.band, job.tenant)
    local turn = seat and redis.call('ZRANK', PREFIX .. 'tenants:' .. job.band, seat)
    found = { turn = turn or look_at_band(seen, job.band).seats, free = free, cap = cap, above = 0 }
    for _, band in ipairs(cap and BANDS or {}) do
      if band > tonumber(job.band) then found.above = found.above + count_in_line(band, job.tenant) end
    end
    seen.tenants[name] = found
  end
  return found
end

-- Returns the estimated number of jobs that start before a waiting one, and the estimated milliseconds until it
-- starts, -1 while nothing was measured. Within its band as many rounds of all tenants are ahead as it has jobs of
-- its own before it, and the tenants before its own.
local function place_of(seen, job)
  if job.pin ~= '' then
    return redis.call('ZRANK', PREFIX .. 'pinned:' .. job.pin, job.id), wait_of(seen, 0)
  end
  local band, tenant = look_at_band(seen, job.band), look_at_tenant(seen, job)
  local place = redis.call('ZRANK', PREFIX .. 'waiting:' .. job.band .. ':' .. job.tenant, job.id)
  local before = math.min(place * math.max(band.seats, 1) + tenant.turn, band.jobs - 1)
  local above, tokens_above = count_above(seen, job, before)
  local wait_ms = wait_of(seen, tokens_above + math.floor(before * band.tokens / band.jobs))
  if wait_ms >= 0 and tenant.free then
    -- Whoever may run few jobs at once waits for its own, too.
    local rounds = math.max(0, tenant.above + place + 1 - tenant.free) / math.max(tenant.cap, 1)
    wait_ms = math.max(wait_ms, math.floor(rounds * seen.service_ms))
  end
  return above + before, wait_ms
end

-- Takes a finished job's service time, in all of its slots, and what it was expected to cost, into the means, a
-- tenth of their weight at a time.
local function note_service(job)
  local took, tokens = (NOW - tonumber(job.granted_at)) * slots_of(job), tonumber(job.cost)
  local service_ms, service_tokens = read_means()
  service_ms, service_tokens = service_ms or took, service_tokens or tokens
  redis.call('HSET', PREFIX .. 'stats',
    'service_ms', string.format('%.3f', service_ms + 0.1 * (took - service_ms)),
    'service_tokens', string.format('%.3f', service_tokens + 0.1 * (tokens - service_tokens)))
  redis.call('EXPIRE', PREFIX .. 'stats', STATS_TTL_S)
end

-- Puts a job whose attempt ended back to its place, at its old arrival. The caller may repeat itself when
-- its answer was lost: the nonce of the attempt that ended is kept, and recognised. Returns 1 or 0.
local function put_back(id, nonce, prepare)
  local job = load_job(id)
  if is_current(job, nonce) then
    take_back(job)
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
