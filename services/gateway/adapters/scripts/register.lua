-- register(job_id, submission, tenant, band, cost_tokens, timeout_ms, waited_ms, nonce, attempt,
--          worker_id, address, revision, epoch, digest, payload, keep_ms)
-- Enters a job that runs already, after Redis lost it, so that its slot counts again. What Redis knows wins:
-- an attempt under another nonce, an end, or a namesake. Only this submission's own wait gives way.
-- Returns 1 if the attempt is current now, else 0.

local id, submission, tenant, band, cost = ARGV[6], ARGV[7], ARGV[8], ARGV[9], ARGV[10]
local timeout_ms, waited_ms, nonce, attempt = tonumber(ARGV[11]), tonumber(ARGV[12]), ARGV[13], ARGV[14]
local worker, address, revision, epoch = ARGV[15], ARGV[16], ARGV[17], ARGV[18]

local known = load_job(id)
if is_current(known, nonce) then
  redis.call('ZADD', PREFIX .. 'lease', NOW + LEASE_MS, id)
  return 1
end
local is_same = known and known.submission == submission
if is_same and known.state ~= 'waiting' then return 0 end
-- A resumable job that another gateway took over has ended there.
if known and not is_same and (is_live(known) or known.keep_ms) then return 0 end

if is_same then take_waiting(known) end
redis.call('DEL', PREFIX .. 'job:' .. id)
local job = {
  id = id, state = 'running', submission = submission, owner = CALLER, tenant = tenant, band = band,
  cost = cost, deadline = NOW + timeout_ms, arrival = arrival_of(waited_ms), attempt = attempt,
  nonce = nonce, ended_nonce = '', pin = '', avoid = '',
  worker = worker, address = address, revision = revision, epoch = epoch, granted_at = NOW,
}
note_resumable(job, ARGV[19], ARGV[20], ARGV[21])
store_job(job)
put_running(job)
return 1
