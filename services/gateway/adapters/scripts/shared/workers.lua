-- Workers and the route, as the controller wrote them, and which worker takes a job.

-- A suspicion lasts a second at most; the key goes when nobody was suspect for a minute.
local SUSPECTS_TTL_MS = 60000

-- Keeps a worker from new jobs for a while.
local function suspect_worker(worker_id, hold_ms)
  redis.call('HSET', PREFIX .. 'suspect', worker_id, NOW + hold_ms)
  redis.call('PEXPIRE', PREFIX .. 'suspect', SUSPECTS_TTL_MS)
end

local function load_worker(worker_id)
  local flat = redis.call('HGETALL', PREFIX .. 'worker:' .. worker_id)
  local worker = { id = worker_id, ready = {} }
  for i = 1, #flat, 2 do
    if string.sub(flat[i], 1, 2) == 'r:' then
      worker.ready[string.sub(flat[i], 3)] = true
    else
      worker[flat[i]] = flat[i + 1]
    end
  end
  local suspect_until = redis.call('HGET', PREFIX .. 'suspect', worker_id)
  worker.slots = tonumber(worker.slots or 0)
  worker.running = redis.call('HLEN', PREFIX .. 'running:' .. worker_id)
  worker.is_alive = tonumber(worker.lease_end_ms or 0) > NOW
  worker.is_open = worker.draining == '0' and not (suspect_until and tonumber(suspect_until) > NOW)
  return worker
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

-- Returns the route and the workers as they stand. Workers whose lease has lapsed are left out, unless all
-- have: then it is the controller that is away, and leases are not judged.
local function look_at_workers()
  local view = { epoch = '0', routed = {}, total_weight = 0, workers = {}, slots = 0 }
  load_route(view)
  local known, any_alive = {}, false
  for _, worker_id in ipairs(redis.call('SMEMBERS', PREFIX .. 'workers')) do
    local worker = load_worker(worker_id)
    known[#known + 1] = worker
    any_alive = any_alive or worker.is_alive
    view.slots = view.slots + worker.slots
  end
  for _, worker in ipairs(known) do
    if worker.is_open and (worker.is_alive or not any_alive) then
      view.workers[#view.workers + 1] = worker
    end
  end
  return view
end

local function is_less_loaded(a, b)
  local load_a, load_b = a.running / a.slots, b.running / b.slots
  if load_a ~= load_b then return load_a < load_b end
  return a.id < b.id
end

-- Returns the least loaded worker with a free slot that is ready for the revision, or nil. The worker to
-- avoid, where the job failed last, is taken only if there is no other.
local function pick_worker(view, revision, avoid)
  local best, fallback
  for _, worker in ipairs(view.workers) do
    if worker.running < worker.slots and worker.ready[revision] then
      if worker.id == avoid then
        fallback = worker
      elseif not best or is_less_loaded(worker, best) then
        best = worker
      end
    end
  end
  return best or fallback
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

-- Returns worker and revision for a job, or nil while no worker can take it.
local function place_job(view, job)
  if job.pin ~= '' then return pick_worker(view, job.pin, job.avoid), job.pin end
  if view.total_weight == 0 then return nil end
  local wanted = weighted_revision(view, job.id)
  local worker = pick_worker(view, wanted, job.avoid)
  if worker then return worker, wanted end
  for _, revision in ipairs(view.routed) do
    worker = pick_worker(view, revision.name, job.avoid)
    if worker then return worker, revision.name end
  end
end
