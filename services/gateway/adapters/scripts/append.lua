-- append(job_id, nonce, position, events_max, bytes_max, event ...)
-- Writes events of a resumable job behind the first `position` ones of its log. Refused unless the attempt is
-- current: a gateway that slept cannot speak once another one has taken its job.
-- Returns {'written' | 'gap', end}, where a gap means that the log ends before `position`; {'stale'}; or
-- {'full'}.

local id, nonce, position = ARGV[6], ARGV[7], tonumber(ARGV[8])
local events_max, bytes_max = tonumber(ARGV[9]), tonumber(ARGV[10])

-- Not the whole record: this runs for every few tokens.
local fields = redis.call('HMGET', PREFIX .. 'job:' .. id, 'state', 'nonce', 'deadline', 'keep_ms', 'log_bytes')
local job = { id = id, state = fields[1], nonce = fields[2], deadline = fields[3], keep_ms = fields[4] }
if not is_current(job, nonce) or not job.keep_ms then return { 'stale' } end

local before = redis.call('LLEN', PREFIX .. 'log:' .. id)
if position > before then return { 'gap', before } end

local bytes = tonumber(fields[5] or 0)
for i = 11 + before - position, #ARGV do bytes = bytes + #ARGV[i] end
if position + #ARGV - 10 > events_max or bytes > bytes_max then return { 'full' } end

local finish = append_log(job, position, 11)
if finish > before then redis.call('HSET', PREFIX .. 'job:' .. id, 'log_bytes', bytes) end
return { 'written', finish }
