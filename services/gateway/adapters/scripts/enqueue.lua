-- enqueue(job_id, submission, tenant, band, cost_tokens, timeout_ms, waited_ms, waiting_jobs_max,
--         digest, payload, keep_ms)
-- Accepts a job, and grants it a slot at once where one is free and nobody is before it.
-- Returns {'granted' | 'waiting', position, wait_ms, grants}, {'full', waiting, wait_ms}, {'exists'} or
-- {'ended', outcome}. Writes a job, its indices, and what the grants touch.

local id, submission, tenant, band = ARGV[6], ARGV[7], ARGV[8], ARGV[9]
local cost, timeout_ms, waited_ms, bound = ARGV[10], tonumber(ARGV[11]), tonumber(ARGV[12]), tonumber(ARGV[13])
local digest, payload, keep_ms = ARGV[14], ARGV[15], ARGV[16]

local function answer_of(job)
  local view = grant_free()
  local current = load_job(id)
  if current.state == 'waiting' then
    local position = position_of(current)
    return { 'waiting', position, wait_of(position, view.slots), GRANTED }
  end
  -- A repeated call whose first answer was lost hears of the grant again.
  if job.state == 'running' then GRANTED[#GRANTED + 1] = encode_grant(current) end
  return is_live(current) and { 'granted', 0, 0, GRANTED } or { 'ended', current.state }
end

local known = load_job(id)
if known and known.submission == submission then
  if is_live(known) then return answer_of(known) end
  return { 'ended', known.state }
end
-- The answer of a resumable job is kept in its log, and never generated twice.
if is_live(known) or known and known.keep_ms then return { 'exists' } end

expire_overdue()
local waiting = count_waiting()
-- A job that was accepted once comes back after a loss in Redis; it is not refused now.
if waited_ms == 0 and waiting >= bound then
  return { 'full', waiting, wait_of(0, look_at_workers().slots) }
end

redis.call('DEL', PREFIX .. 'job:' .. id)
local job = {
  id = id, state = 'waiting', submission = submission, owner = CALLER, tenant = tenant, band = band,
  cost = cost, deadline = NOW + timeout_ms, attempt = 0, nonce = '', ended_nonce = '', pin = '', avoid = '',
  arrival = arrival_of(waited_ms),
}
note_resumable(job, digest, payload, keep_ms)
store_job(job)
put_waiting(job)
return answer_of(job)
