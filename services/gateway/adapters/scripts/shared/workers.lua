-- Workers and the route, as the controller wrote them, and which worker takes a job.

-- A call brings at most this many workers back from a hold or a lapse, so that it stays short.
local RETURNS_MAX = 64
-- A job looks at this many workers of a revision at most; those before them must all be barred to it, or have
-- fewer free slots than it needs. The largest worker is looked for among as many.
local WORKERS_LOOKED_AT_MAX = 64

-- Keeps a worker from new jobs for a while. What it is held for already does not become less: who refuses a job
-- knows nothing of the one that failed there.
local function suspect_worker(worker_id, hold_ms)
  redis.call('ZADD', PREFIX .. 'held', 'GT', NOW + hold_ms, worker_id)
  index_worker(worker_id)
end

-- Lets workers be used again whose hold has ended. They are in no other index meanwhile, so that only this brings
-- them back: `held` has no time to live.
local function release_held()
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', PREFIX .. 'held', '-inf', NOW, 'LIMIT', 0, RETURNS_MAX)) do
    redis.call('ZREM', PREFIX .. 'held', id)
    index_worker(id)
  end
end

-- Heaviest first, ties by name: the order in which revisions are tried.
local function by_weight(a, b)
  if a.weight ~= b.weight then return a.weight > b.weight end
  return a.name < b.name
end

local function load_route(view)
  local flat = redis.call('HGETALL', PREFIX .. 'route')
  for i = 1, #flat, 2 do
    local weight = tonumber(flat[i + 1])
    if flat[i] == 'epoch' then
      view.epoch = flat[i + 1]
    elseif string.sub(flat[i], 1, 2) == 'w:' and weight > 0 then
      view.routed[#view.routed + 1] = { name = string.sub(flat[i], 3), weight = weight }
      view.total_weight = view.total_weight + weight
    end
  end
  table.sort(view.routed, by_weight)
end

-- Whether the controller has written the route. It writes the workers first: where there is no route, Redis
-- was emptied and knows of nobody.
local function has_route()
  return redis.call('HEXISTS', PREFIX .. 'route', 'epoch') == 1
end

-- Returns the route, and what holds for all workers. Leases are judged as long as any worker has one; when all
-- have lapsed it is the controller that is away, and those that were left out return.
local function look_at_workers()
  local view = { epoch = '0', routed = {}, total_weight = 0, kept_free = {} }
  load_route(view)
  release_held()
  view.judges_leases = redis.call('ZCOUNT', PREFIX .. 'expiry', '(' .. NOW, '+inf') > 0
  if not view.judges_leases then
    for _, id in ipairs(redis.call('SPOP', PREFIX .. 'lapsed', RETURNS_MAX)) do index_worker(id) end
  end
  view.has_open = redis.call('EXISTS', PREFIX .. 'opened') == 1
  return view
end

-- The least end of a lease that counts, as Redis reads bounds.
local function least_expiry(view)
  return view.judges_leases and '(' .. NOW or '-inf'
end

local function count_slots()
  return tonumber(redis.call('HGET', PREFIX .. 'fleet', 'slots') or 0)
end

-- Returns whether the lease of a worker has lapsed; such a worker leaves the index until it is written again.
local function has_lapsed(view, revision, worker_id)
  if not view.judges_leases then return false end
  if tonumber(redis.call('ZSCORE', PREFIX .. 'expiry', worker_id) or 0) > NOW then return false end
  redis.call('ZREM', PREFIX .. 'free:' .. revision, worker_id)
  redis.call('SADD', PREFIX .. 'lapsed', worker_id)
  return true
end

-- Returns 'closed', 'open', or 'trial' where the sleep of an open breaker is over; and what is left of the sleep
-- of one that is open, unless it is forced. An open pair holds its end and the length of its sleep, both in
-- milliseconds, or 'forced'.
local function breaker_of(view, gateway, worker_id)
  local pair = view.has_open and redis.call('HGET', PREFIX .. 'open:' .. worker_id, gateway)
  if not pair then return 'closed' end
  if pair == 'forced' then return 'open' end
  local left_ms = tonumber(string.match(pair, '^%d+')) - NOW
  if left_ms <= 0 then return 'trial' end
  return 'open', left_ms
end

-- Returns how many workers take jobs, with or without a free slot, whose breakers for the caller are closed; and
-- how many are due for a trial by it. Of more workers than are looked at, all count as closed.
local function count_takers(view)
  local least = least_expiry(view)
  local count, due = redis.call('ZCOUNT', PREFIX .. 'takers', least, '+inf'), 0
  if not view.has_open or count > WORKERS_LOOKED_AT_MAX then return count, due end
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', PREFIX .. 'takers', least, '+inf')) do
    local breaker = breaker_of(view, CALLER, id)
    if breaker ~= 'closed' then count = count - 1 end
    if breaker == 'trial' then due = due + 1 end
  end
  return count, due
end

-- Returns a test of whether a worker is ready for any revision of the route, and not draining.
local function serves_route(view)
  local names = { 'draining' }
  for _, revision in ipairs(view.routed) do names[#names + 1] = 'r:' .. revision.name end
  return function(worker_id)
    local fields = redis.call('HMGET', PREFIX .. 'worker:' .. worker_id, unpack(names))
    if fields[1] ~= '0' then return false end
    for i = 2, #names do
      if fields[i] then return true end
    end
    return false
  end
end

-- Returns how many milliseconds every worker that serves the route is barred to the caller for, -1 where operators
-- bar them all; nil where one is not, none is there, or more are than are looked at. A suspect is there: it is
-- back in a moment.
local function barred_ms(view)
  local limit = WORKERS_LOOKED_AT_MAX
  local ids = redis.call('ZREVRANGEBYSCORE', PREFIX .. 'expiry', '+inf', least_expiry(view), 'LIMIT', 0, limit + 1)
  if #ids > limit then return nil end
  local serves, soonest_ms = serves_route(view), nil
  for _, id in ipairs(ids) do
    if serves(id) then
      local breaker, left_ms = breaker_of(view, CALLER, id)
      if breaker ~= 'open' then return nil end
      soonest_ms = soonest_ms or -1
      if left_ms and (soonest_ms < 0 or left_ms < soonest_ms) then soonest_ms = left_ms end
    end
  end
  return soonest_ms
end

local function close_pair(gateway, worker_id)
  redis.call('HDEL', PREFIX .. 'open:' .. worker_id, gateway)
  if redis.call('EXISTS', PREFIX .. 'open:' .. worker_id) == 0 then
    redis.call('SREM', PREFIX .. 'opened', worker_id)
  end
end

-- Lists a pair as open for another sleep: its one trial is under way.
local function note_trial(gateway, worker_id)
  local key = PREFIX .. 'open:' .. worker_id
  local sleep_ms = string.match(redis.call('HGET', key, gateway), '(%d+)$')
  redis.call('HSET', key, gateway, string.format('%.0f %s', NOW + tonumber(sleep_ms), sleep_ms))
end

-- Returns the slots of the largest worker that is not draining and whose lease has not lapsed.
local function largest_worker(view)
  if view.largest then return view.largest end
  view.largest = 1
  local least, limit = least_expiry(view), WORKERS_LOOKED_AT_MAX
  local ids = redis.call('ZREVRANGEBYSCORE', PREFIX .. 'expiry', '+inf', least, 'LIMIT', 0, limit)
  for _, id in ipairs(ids) do
    local fields = redis.call('HMGET', PREFIX .. 'worker:' .. id, 'slots', 'draining')
    if fields[2] == '0' then view.largest = math.max(view.largest, tonumber(fields[1])) end
  end
  return view.largest
end

-- Returns how many free slots of a worker the job needs. One that needs more than any worker has is given a whole
-- one, which refuses it and says why.
local function needed_slots(view, job)
  return slots_of(job) == 1 and 1 or math.min(slots_of(job), largest_worker(view))
end

local function slots_of_worker(worker_id)
  return tonumber(redis.call('HGET', PREFIX .. 'worker:' .. worker_id, 'slots'))
end

-- Whether a worker, which has a free slot, has as many as are needed.
local function has_room(worker_id, needed)
  return needed == 1 or slots_of_worker(worker_id) - redis.call('HLEN', PREFIX .. 'running:' .. worker_id) >= needed
end

-- Returns the least loaded worker with as many free slots as are needed that is ready for the revision and not
-- barred to the job's gateway, or nil; and whether it is a trial. The worker to avoid, where the job failed last, is
-- taken only if there is no other. Adds those that have fewer free slots to `short`.
local function pick_worker(view, revision, job, needed, short)
  local fallback, fallback_trial
  local ids = redis.call('ZRANGE', PREFIX .. 'free:' .. revision, 0, WORKERS_LOOKED_AT_MAX - 1)
  for _, id in ipairs(ids) do
    local breaker = breaker_of(view, job.owner, id)
    if breaker ~= 'open' and not view.kept_free[id] and not has_lapsed(view, revision, id) then
      if not has_room(id, needed) then
        short[#short + 1] = id
      elseif id ~= job.avoid then
        return id, breaker == 'trial'
      else
        fallback, fallback_trial = id, breaker == 'trial'
      end
    end
  end
  return fallback, fallback_trial
end

-- Returns the revision that the route's weights give to this job. The same job gets the same answer as long
-- as the route stands, so that a canary's share is a set of jobs and not a lottery at each attempt.
local function weighted_revision(view, job_id)
  local point = tonumber(string.sub(redis.sha1hex(job_id), 1, 8), 16) % view.total_weight
  for _, revision in ipairs(view.routed) do
    point = point - revision.weight
    if point < 0 then return revision.name end
  end
end

-- Returns the revisions that may take the job, in the order in which they are tried.
local function revisions_of(view, job)
  if job.pin ~= '' then return { job.pin } end
  if view.total_weight == 0 then return {} end
  local names = { weighted_revision(view, job.id) }
  for _, revision in ipairs(view.routed) do
    if revision.name ~= names[1] then names[#names + 1] = revision.name end
  end
  return names
end

-- Returns worker, revision and whether it is a trial, or nil while no worker can take the job. Then the slots
-- that are free, and too few for it, are kept for it: whoever comes behind it looks elsewhere. Workers that are too
-- small for it whatever ends there go to the others, and so that these do not go before it for ever, it is due.
local function place_job(view, job)
  local needed, short = needed_slots(view, job), {}
  for _, revision in ipairs(revisions_of(view, job)) do
    local worker_id, is_trial = pick_worker(view, revision, job, needed, short)
    if worker_id then return worker_id, revision, is_trial end
  end
  local is_passed = false
  for _, id in ipairs(short) do
    if slots_of_worker(id) >= needed then view.kept_free[id] = true else is_passed = true end
  end
  if is_passed and job.pin == '' then note_due(job) end
end
