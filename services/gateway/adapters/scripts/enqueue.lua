-- enqueue(job_id, submission, tenant, band, cost_tokens, timeout_ms, waited_ms, weight, concurrency | '',
--         tokens_per_minute | '', waiting_jobs_max, tenant_waiting_jobs_max, aging_ms, digest, payload, keep_ms,
--         expects_route, slots, used_tokens, pin | '', pin_ms)
-- Accepts a job, and grants it its slots of a worker at once where they are free and it is its turn. A job that
-- is known learns what it has used and which revision's text it has.
-- Returns {'granted' | 'waiting', position, wait_ms, grants, account}, {'exists'}, {'ended', outcome, 0, grants},
-- {'emptied'} where the caller knows of a route that is not here, or a refusal: {'full' | 'tenant_full',
-- waiting, wait_ms, grants, account}, {'quota', taken tokens, ms until the window ends, grants, account},
-- {'late', position, wait_ms, grants, account} or {'barred', 0, ms until a breaker is tried | -1, grants, account}
-- where those of all workers are open to the caller. An account is {taken tokens, ms until the window ends, jobs} of
-- the tenant, empty where it has no limit. Writes a job, its indices, its tenant's accounts, and what the grants
-- touch.

local id, submission, tenant, band = ARGV[6], ARGV[7], ARGV[8], ARGV[9]
local cost, timeout_ms, waited_ms = ARGV[10], tonumber(ARGV[11]), tonumber(ARGV[12])
local weight, cap, limit = ARGV[13], ARGV[14], tonumber(ARGV[15])
local jobs_max, tenant_jobs_max, aging_ms = tonumber(ARGV[16]), tonumber(ARGV[17]), tonumber(ARGV[18])
local digest, payload, keep_ms, expects_route = ARGV[19], ARGV[20], ARGV[21], ARGV[22] == '1'
local slots, used_tokens, pin, pin_ms = ARGV[23], tonumber(ARGV[24]), ARGV[25], tonumber(ARGV[26])

if expects_route and not has_route() then return { 'emptied' } end

-- A job that was accepted once comes back after a loss in Redis; it is not refused now.
local is_new = waited_ms == 0

local function account()
  if not limit and cap == '' then return {} end
  local used, reserved = read_account(tenant)
  local counts = redis.call('HMGET', tenant_key(tenant), 'waiting', 'running')
  return { used + reserved, WINDOW_MS - NOW % WINDOW_MS, tonumber(counts[1] or 0) + tonumber(counts[2] or 0) }
end

-- What the estimates rest on, once one was made.
local seen

local function answer_of(job)
  grant_free()
  local current = read_job(id, 'state', 'band', 'tenant', 'pin')
  if current.state == 'waiting' then
    seen = survey()
    local position, wait_ms = place_of(seen, current)
    return { 'waiting', position, wait_ms, GRANTED, account() }
  end
  -- A repeated call whose first answer was lost hears of the grant again.
  if job.state == 'running' then GRANTED[#GRANTED + 1] = encode_grant(load_job(id)) end
  return is_live(current) and { 'granted', 0, 0, GRANTED, account() } or { 'ended', current.state, 0, GRANTED }
end

-- Pins a known job. A grant of another revision was heard by nobody, or the text would be of that one: it is
-- taken back.
local function bind(job)
  if job.state == 'waiting' then
    take_waiting(job)
  elseif job.revision ~= pin then
    take_back(job)
    job.state, job.nonce, job.ended_nonce = 'waiting', '', job.nonce
  end
  job.pin, job.pin_until = pin, NOW + pin_ms
  store_job(job)
  if job.state == 'waiting' then put_waiting(job) end
end

local function go_on(job)
  if used_tokens > 0 then
    note_used(job, used_tokens)
    store_job(job)
  end
  if pin ~= '' and job.pin ~= pin then bind(job) end
end

-- Returns the refusal of a job that would wait for workers whose breakers are all open, or nil. What has a text, or
-- waited before they opened, waits on.
local function barred()
  if pin ~= '' or redis.call('EXISTS', PREFIX .. 'opened') == 0 then return end
  local ms = barred_ms(look_at_workers())
  return ms and { 'barred', 0, ms, GRANTED, account() }
end

-- Returns why there is no place for the job, or nil.
local function crowded()
  local waiting = count_waiting()
  if waiting >= jobs_max then return { 'full', waiting, wait_of(survey(), 0), GRANTED, account() } end
  local own = tonumber(redis.call('HGET', tenant_key(tenant), 'waiting') or 0)
  if own >= tenant_jobs_max then return { 'tenant_full', own, wait_of(survey(), 0), GRANTED, account() } end
end

-- Returns why the job is not taken, or nil. Nobody is turned away while a slot is free for those that wait: a
-- hold may have ended since the last call.
local function refusal()
  if crowded() then
    grant_free()
    local full = crowded()
    if full then return full end
  end
  if not limit then return end
  local used, reserved = read_account(tenant)
  if used + reserved + tonumber(cost) > limit then
    return { 'quota', used + reserved, WINDOW_MS - NOW % WINDOW_MS, GRANTED, account() }
  end
end

-- First, so that a job whose time is over is known as one that has ended.
expire_overdue()
local known = load_job(id)
if known and known.submission == submission then
  if is_live(known) then
    go_on(known)
    return answer_of(known)
  end
  return { 'ended', known.state }
end
-- The answer of a resumable job is kept in its log, and never generated twice.
if is_live(known) or known and known.keep_ms then return { 'exists' } end

local refused = is_new and (barred() or refusal())
if refused then return refused end

if known then redis.call('DEL', PREFIX .. 'job:' .. id) end
local job = {
  id = id, state = 'waiting', submission = submission, owner = CALLER, tenant = tenant, band = band, aged = '0',
  cost = cost, weight = weight, cap = cap, deadline = NOW + timeout_ms, ages_at = NOW - waited_ms + aging_ms,
  attempt = 0, nonce = '', ended_nonce = '', pin = pin, avoid = '', charged = '', arrival = arrival_of(waited_ms),
  pin_until = NOW + pin_ms,
  -- Most jobs take one, and their records do not say so.
  slots = slots ~= '1' and slots or nil,
  again_at = not is_new and NOW or nil,
}
note_used(job, used_tokens)
note_resumable(job, digest, payload, keep_ms)
store_job(job)
admit_job(job)
put_waiting(job)
local answer = answer_of(job)
-- Nobody shall wait for nothing: what starts so late that it cannot end in time would take a slot in vain.
local starts_ms = is_new and answer[1] == 'waiting' and answer[3] or -1
if starts_ms >= 0 and starts_ms + service_of(seen, cost) / tonumber(slots) > timeout_ms then
  finish_job(load_job(id), 'expired')
  redis.call('DEL', PREFIX .. 'job:' .. id)
  answer[1], answer[5] = 'late', account()
end
return answer
