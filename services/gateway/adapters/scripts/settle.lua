-- settle(job_id, nonce, outcome, used_tokens)
-- Ends a granted job, corrects what its tenant was charged, frees its slot, and lends it again. Without effect
-- unless the grant is current.
-- Returns {1 | 0, grants}.

local id, nonce, outcome, used_tokens = ARGV[6], ARGV[7], ARGV[8], ARGV[9]

local job = load_job(id)
local settled = is_current(job, nonce)
if settled then
  if outcome == 'finished' then note_service(job) end
  finish_job(job, outcome, tonumber(used_tokens))
  redis.call('HSET', PREFIX .. 'job:' .. id, 'used', used_tokens)
end
grant_free()
return { settled and 1 or 0, GRANTED }
