-- attended(job_id)
-- Returns how many milliseconds ago a gateway read the job's log for a client; -1: not lately, or never.

local latest = redis.call('ZREVRANGE', PREFIX .. 'followers:' .. ARGV[6], 0, 0, 'WITHSCORES')[2]
return latest and math.max(NOW - tonumber(latest), 0) or -1
