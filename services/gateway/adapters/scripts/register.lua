-- register(job_id, submission, tenant, band, cost_tokens, timeout_ms, waited_ms, nonce, attempt,
--          worker_id, address, revision, epoch, weight, concurrency | '', aging_ms, digest, payload, keep_ms,
--          slots, used_tokens, instead, pin | '', pin_ms)
-- Enters a job that runs already, after Redis lost it, so that its slot and its reservation count again; its
-- tenant's share is not charged, since the shares began anew. What Redis knows wins:
-- an attempt under another nonce, an end, or a namesake. Only this submission's own wait gives way; with
-- `instead` an attempt of it as well, which its gateway had not heard of, or has ended since.
-- Returns 1 if the attempt is current now, else 0.

local id, submission, tenant, band, cost = ARGV[6], ARGV[7], ARGV[8], ARGV[9], ARGV[10]
local timeout_ms, waited_ms, nonce, attempt = tonumber(ARGV[11]), tonumber(ARGV[12]), ARGV[13], ARGV[14]
local worker, address, revision, epoch = ARGV[15], ARGV[16], ARGV[17], ARGV[18]
local weight, cap, aging_ms, instead = ARGV[19], ARGV[20], tonumber(ARGV[21]), ARGV[27] == '1'
local pin, pin_ms = ARGV[28], tonumber(ARGV[29])

local known = load_job(id)
if is_current(known, nonce) then
  redis.call('ZADD', PREFIX .. 'lease', NOW + LEASE_MS, id)
  return 1
end
local is_same = known and known.submission == submission
if is_same and pin == '' then pin = known.pin or '' end
if is_same and known.state ~= 'waiting' and not (instead and known.state == 'running') then return 0 end
-- A resumable job that another gateway took over has ended there.
if known and not is_same and (is_live(known) or known.keep_ms) then return 0 end

if is_same then
  band = known.band
  if known.state == 'waiting' then
    take_waiting(known)
  else
    take_running(known)
    correct_charge(known, 0)
  end
end
redis.call('DEL', PREFIX .. 'job:' .. id)
local job = {
  id = id, state = 'running', submission = submission, owner = CALLER, tenant = tenant, band = band,
  aged = is_same and known.aged or '0', cost = cost, weight = weight, cap = cap, charged = '',
  deadline = NOW + timeout_ms, ages_at = NOW - waited_ms + aging_ms, arrival = arrival_of(waited_ms),
  attempt = attempt, nonce = nonce, ended_nonce = '', pin = pin, pin_until = NOW + pin_ms, avoid = '',
  worker = worker, address = address, revision = revision, epoch = epoch, granted_at = NOW, trial = '0',
  slots = ARGV[25] ~= '1' and ARGV[25] or nil,
  used = is_same and known.used or nil, again_at = NOW,
  -- That its subject wants it ended, which its gateway may not have heard yet.
  cancelled = is_same and known.cancelled or nil, stopped_by = is_same and known.stopped_by or nil,
}
note_used(job, tonumber(ARGV[26]))
note_resumable(job, ARGV[22], ARGV[23], ARGV[24])
store_job(job)
if is_same then set_cap(tenant, cap) else admit_job(job) end
put_running(job)
return 1
