-- The clock inside Redis. Every script of a model reads it, the controller's too, so that leases, deadlines
-- and ages are measured by one clock whoever wrote them, and no process's own clock matters.

-- Members call each second. A longer silence means that Redis itself, or all of them, stood still; counted
-- in full it would expire every lease at once.
local JUMP_MS = 3000
-- What such a silence counts for: one round of renewals.
local TICK_MS = 1000

-- Returns the logical time in milliseconds, which begins at Redis's own and never goes back.
local function read_clock(prefix)
  local time = redis.call('TIME')
  local real = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
  local last = redis.call('HMGET', prefix .. 'clock', 'real', 'logical')
  local logical = real
  if last[1] then
    local step = math.max(0, real - tonumber(last[1]))
    if step > JUMP_MS then step = TICK_MS end
    logical = tonumber(last[2]) + step
  end
  redis.call('HSET', prefix .. 'clock', 'real', real, 'logical', logical)
  return logical
end
