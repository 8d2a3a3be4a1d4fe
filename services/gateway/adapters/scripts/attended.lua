-- attended(job_id)
-- Returns how many milliseconds ago a gateway read the job's log for a client; -1: not lately, or never. -2 where
-- nobody can say: the job is not known, or was entered again, after a loss, so lately that those who follow it need
-- not have looked since.

local latest = redis.call('ZREVRANGE', PREFIX .. 'followers:' .. ARGV[6], 0, 0, 'WITHSCORES')[2]
if latest then return math.max(NOW - tonumber(latest), 0) end

local job = read_job(ARGV[6], 'state', 'again_at')
return job.state and NOW - tonumber(job.again_at or 0) >= FOLLOWING_MS and -1 or -2
