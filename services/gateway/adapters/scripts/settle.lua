-- settle(job_id, nonce, outcome, used_tokens [, position, event ...])
-- Ends a granted job, corrects what its tenant was charged, frees its slot, and lends it again. Of a resumable job
-- it carries the events that were not appended yet. Without effect unless the grant is current and the log has all
-- that stands before those: one that was lost is written whole by the next call, or the answer would be lost.
-- Returns {1 | 0, grants}.

local id, nonce, outcome, used_tokens = ARGV[6], ARGV[7], ARGV[8], ARGV[9]

local job = load_job(id)
local settled = is_current(job, nonce)
if settled and ARGV[10] and job.keep_ms then
  local position = tonumber(ARGV[10])
  settled = append_log(job, position, 11) >= position
end
if settled then
  if outcome == 'finished' then note_service(job) end
  finish_job(job, outcome, tonumber(used_tokens))
end
grant_free()
return { settled and 1 or 0, GRANTED }
