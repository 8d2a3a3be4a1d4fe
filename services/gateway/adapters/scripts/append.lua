-- append(job_id, nonce, position, events_max, bytes_max, used_tokens, event ...)
-- Writes events of a resumable job behind the first `position` ones of its log. Refused unless the attempt is
-- current: a gateway that slept cannot speak once another one has taken its job. What the job has used so far is
-- noted: its gateway may not live to tell.
-- Returns {'written' | 'gap', end}, where a gap means that the log ends before `position`; {'stale'};
-- {'lost'}, where no such job is known; or {'full'}.

local id, nonce, position = ARGV[6], ARGV[7], tonumber(ARGV[8])
local events_max, bytes_max, used_tokens = tonumber(ARGV[9]), tonumber(ARGV[10]), tonumber(ARGV[11])

-- Not the whole record: this runs for every few tokens.
local job = read_job(id, 'state', 'nonce', 'deadline', 'keep_ms', 'log_bytes', 'used')
if not job.state then return { 'lost' } end
if not is_current(job, nonce) or not job.keep_ms then return { 'stale' } end

local before = redis.call('LLEN', PREFIX .. 'log:' .. id)
if position > before then return { 'gap', before } end

local bytes = tonumber(job.log_bytes or 0)
for i = 12 + before - position, #ARGV do bytes = bytes + #ARGV[i] end
if position + #ARGV - 11 > events_max or bytes > bytes_max then return { 'full' } end

local finish = append_log(job, position, 12)
if finish > before then
  note_used(job, used_tokens)
  job.log_bytes = bytes
  store_fields(job, { 'log_bytes', 'used' })
end
return { 'written', finish }
