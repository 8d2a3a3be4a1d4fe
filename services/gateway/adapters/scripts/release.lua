-- release(job_id, submission)
-- Hands a resumable job of the caller, which is leaving, to the gateway that was heard of last and stays. An
-- empty submission names whichever the job is under: it came to the caller, which has not taken it up.
-- Returns {1 | 0, grants}: whether there was one to take it.

local id, submission = ARGV[6], ARGV[7]

note_leaving()
local job, peer = load_job(id), latest_staying()
local is_mine = is_live(job) and job.owner == CALLER and (submission == '' or job.submission == submission)
local has_payload = redis.call('EXISTS', PREFIX .. 'payload:' .. id) == 1
local released = is_mine and peer and has_payload
if released then hand_over(job, peer) end
grant_free()
return { released and 1 or 0, GRANTED }
