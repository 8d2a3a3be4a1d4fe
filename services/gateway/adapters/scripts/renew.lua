-- renew(leaving, running_count, {job_id, nonce} ..., waiting job_id ...)
-- Prolongs the caller's leases, compares both ways what it and Redis know, and lends what is free. A caller
-- that says that it leaves (1; else 0) is given no other gateway's jobs from now on.
-- Returns {grants, {job_id, position, wait_ms, ...}, lost job_ids, unknown job_ids, workers, cancelled
-- job_ids}. Workers: how many take jobs, with or without a free slot; -1 when nobody waited, for then nobody
-- looked.

local running_end = 7 + 2 * tonumber(ARGV[7])
local named, lost, waiting, cancelled = {}, {}, {}, {}

-- Whoever came back under its name does not leave any more.
if ARGV[6] == '1' then note_leaving() else redis.call('DEL', PREFIX .. 'leaving:' .. CALLER) end

expire_overdue()

local function prolong(id)
  redis.call('ZADD', PREFIX .. 'lease', NOW + LEASE_MS, id)
end

for i = 8, running_end, 2 do
  local id, nonce = ARGV[i], ARGV[i + 1]
  named[id] = true
  local job = load_job(id)
  if is_current(job, nonce) then
    prolong(id)
    if job.cancelled then cancelled[#cancelled + 1] = id end
  else
    lost[#lost + 1] = id
  end
end

for i = running_end + 1, #ARGV do
  local id = ARGV[i]
  local job = load_job(id)
  named[id] = true
  if not is_live(job) or job.owner ~= CALLER then
    lost[#lost + 1] = id
  else
    prolong(id)
    -- The message of this grant was lost.
    if job.state == 'running' then GRANTED[#GRANTED + 1] = encode_grant(job) else waiting[#waiting + 1] = id end
  end
end

-- What the caller has not named since its lease ended, it has forgotten: a restart under the same id.
local unknown = {}
for _, id in ipairs(redis.call('HKEYS', PREFIX .. 'owned:' .. CALLER)) do
  if not named[id] then
    unknown[#unknown + 1] = id
    if tonumber(redis.call('ZSCORE', PREFIX .. 'lease', id)) < NOW then reap_job(load_job(id)) end
  end
end

local view = grant_free()
local positions = {}
for _, id in ipairs(waiting) do
  local job = load_job(id)
  if job.state == 'waiting' then
    local position, wait_ms = place_of(job)
    for _, value in ipairs({ id, position, wait_ms }) do positions[#positions + 1] = value end
  end
end
return { GRANTED, positions, lost, unknown, view and count_takers(view) or -1, cancelled }
