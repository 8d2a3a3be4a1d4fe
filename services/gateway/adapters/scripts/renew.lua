-- renew(leaving, running_count, places_count, {job_id, nonce} ..., waiting job_id ...)
-- Prolongs the caller's leases, compares both ways what it and Redis know, lends what is free, and tells the
-- places of the first `places_count` of those that wait. A caller that says that it leaves (1; else 0) is given
-- no other gateway's jobs from now on.
-- Returns {grants, {job_id, position, wait_ms, ...}, lost job_ids, unknown job_ids, workers, cancelled
-- job_ids, due}. Workers: how many take jobs of the caller, with or without a free slot; -1 when nobody waited, for
-- then nobody looked. Due: how many others would be tried next.

local waiting_from = 9 + 2 * tonumber(ARGV[7])
local places_until = waiting_from + tonumber(ARGV[8])
local named, kept, lost, asked, cancelled = {}, {}, {}, {}, {}

-- Whoever came back under its name does not leave any more.
if ARGV[6] == '1' then note_leaving() else redis.call('DEL', PREFIX .. 'leaving:' .. CALLER) end

expire_overdue()

-- Not whole records: this runs each second for all that is live.
for i = 9, waiting_from - 1, 2 do
  local id, nonce = ARGV[i], ARGV[i + 1]
  named[id] = true
  local job = read_job(id, 'state', 'nonce', 'cancelled')
  if is_current(job, nonce) then
    kept[#kept + 1] = id
    if job.cancelled then cancelled[#cancelled + 1] = id end
  else
    lost[#lost + 1] = id
  end
end

for i = waiting_from, #ARGV do
  local id = ARGV[i]
  named[id] = true
  local job = read_job(id, 'state', 'owner')
  if not is_live(job) or job.owner ~= CALLER then
    lost[#lost + 1] = id
  else
    kept[#kept + 1] = id
    if job.state == 'running' then
      -- The message of this grant was lost.
      GRANTED[#GRANTED + 1] = encode_grant(load_job(id))
    elseif i < places_until then
      asked[#asked + 1] = id
    end
  end
end
prolong(kept)

-- What the caller has not named since its lease ended, it has forgotten: a restart under the same id.
local unknown = {}
for _, id in ipairs(redis.call('HKEYS', PREFIX .. 'owned:' .. CALLER)) do
  if not named[id] then
    unknown[#unknown + 1] = id
    if tonumber(redis.call('ZSCORE', PREFIX .. 'lease', id)) < NOW then reap_job(load_job(id)) end
  end
end

local view = grant_free()
local positions, seen = {}, #asked > 0 and survey()
for _, id in ipairs(asked) do
  local job = read_job(id, 'state', 'band', 'tenant', 'pin')
  if job.state == 'waiting' then
    local position, wait_ms = place_of(seen, job)
    for _, value in ipairs({ id, position, wait_ms }) do positions[#positions + 1] = value end
  end
end
local workers, due = -1, 0
if view then workers, due = count_takers(view) end
return { GRANTED, positions, lost, unknown, workers, cancelled, due }
