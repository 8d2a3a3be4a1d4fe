-- list_open(worker_id, sleep_ms | 'forced')
-- Keeps the caller's jobs from a worker: for a while, after which one grant tries it, or until it is closed.
-- Returns nothing.

local worker_id, sleep_ms = ARGV[6], ARGV[7]

local pair = 'forced'
if sleep_ms ~= 'forced' then pair = string.format('%.0f %s', NOW + tonumber(sleep_ms), sleep_ms) end
redis.call('HSET', PREFIX .. 'open:' .. worker_id, CALLER, pair)
redis.call('SADD', PREFIX .. 'opened', worker_id)
