-- take_up(job_id)
-- Tells all that is needed to carry on a resumable job that is the caller's and that it does not know: it
-- was adopted, or it is of an earlier process of the same name. What that process had granted is fenced off.
-- Returns {payload, submission, waited_ms, left_ms, adoptions, grant or '', events, grants}, or {} where
-- there is nothing to take up.

local id = ARGV[6]

local job, payload = load_job(id), redis.call('GET', PREFIX .. 'payload:' .. id)
if not is_live(job) or job.owner ~= CALLER or not payload then return {} end

if job.state == 'running' and job.untaken ~= '1' then
  adopt_job(job, CALLER)
  grant_free()
  job = load_job(id)
  if not is_live(job) then return {} end
end

redis.call('HSET', PREFIX .. 'job:' .. id, 'untaken', '0')
redis.call('ZADD', PREFIX .. 'lease', NOW + LEASE_MS, id)
return {
  payload,
  job.submission,
  math.floor(NOW - tonumber(job.arrival) / 1000),
  math.floor(tonumber(job.deadline) - NOW),
  tonumber(job.adoptions or 0),
  job.state == 'running' and encode_grant(job) or '',
  redis.call('LRANGE', PREFIX .. 'log:' .. id, 0, -1),
  GRANTED,
}
