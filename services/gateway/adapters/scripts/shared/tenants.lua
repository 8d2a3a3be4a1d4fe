-- Tenants: whose turn it is within a band, how many jobs of one may run, and what its minute has left.
--
--   served:<band>   tenants by their counter: tokens charged, divided by weight
--   entered:<band>  tenant -> entry and slack, see correct_charge
--   floors          band -> the counter at which an idle tenant enters
--   tenants:<band>  seats of the tenants that may run now, by counter, then by the arrival of the oldest job
--   tenants:lifted  seats of those that have nothing in line in the lowest band but what was lifted out of it
--   tenant:<t>      counts of a tenant's jobs, its cap, its seat in each band, and its lifted job that waits
--   live            band -> jobs that have not ended
--   backlog         band -> estimated tokens of the jobs that wait
--   quota:<t>       window used reserved: tokens of the tenant's minute

-- Tokens are counted by whole minutes of the clock.
local WINDOW_MS = 60000
-- An account that nobody has touched for two windows says nothing any more.
local ACCOUNT_TTL_MS = 2 * WINDOW_MS
-- A seat is the arrival of the oldest job, in this many digits, a colon and the tenant.
local SEAT_DIGITS = 20

-- The lowest band alone ages, into the one above it. Within a band nobody starves, and whoever floods it has the
-- oldest jobs there: they must not overtake those of the others.
local AGING_BAND, AGED_BAND = tostring(BANDS[#BANDS]), tostring(BANDS[#BANDS - 1])

local function tenant_key(tenant)
  return PREFIX .. 'tenant:' .. tenant
end

local function tenant_of(seat)
  return string.sub(seat, SEAT_DIGITS + 2)
end

-- Returns a name behind an arrival, as seats are written.
local function seat_at(arrival, name)
  return string.format('%0' .. SEAT_DIGITS .. '.0f:', tonumber(arrival)) .. name
end

-- Returns a tenant's seat in a band or nil, how many more of its jobs may run, and its cap, which holds for this
-- model; the latter are nil where it has no cap. And its lifted job that waits for its turn, or nil.
local function seat_of(band, tenant)
  local fields = redis.call('HMGET', tenant_key(tenant), 'seat:' .. band, 'cap', 'running', 'lifted')
  local seat, cap, running = fields[1] or nil, tonumber(fields[2] or nil), tonumber(fields[3] or 0)
  return seat, cap and math.max(0, cap - running), cap, fields[4] or nil
end

-- Gives a tenant a seat in the turn of the lowest band that has nothing in line there but what was lifted out of
-- it, by the counter that it had there; none where it has, or has reached its cap. `lifted` is what note_lifted notes.
local function rank_lifted(tenant, lifted, may_sit)
  local seats, seat = PREFIX .. 'tenants:lifted', string.sub(lifted, 1, SEAT_DIGITS + 1) .. tenant
  if may_sit then
    redis.call('ZADD', seats, redis.call('ZSCORE', PREFIX .. 'served:' .. AGING_BAND, tenant) or 0, seat)
  else
    redis.call('ZREM', seats, seat)
  end
end

-- Gives a tenant the seat in a band that its counter and its oldest job are worth; none while it has no job
-- there or has reached its cap.
local function rank_tenant(band, tenant)
  local seats, field = PREFIX .. 'tenants:' .. band, 'seat:' .. band
  local old, free, _, lifted = seat_of(band, tenant)
  local head = redis.call('ZRANGE', PREFIX .. 'waiting:' .. band .. ':' .. tenant, 0, 0, 'WITHSCORES')
  if lifted and band == AGING_BAND then rank_lifted(tenant, lifted, not head[1] and free ~= 0) end
  local seat
  if head[1] and free ~= 0 then
    seat = seat_at(head[2], tenant)
    redis.call('ZADD', seats, redis.call('ZSCORE', PREFIX .. 'served:' .. band, tenant), seat)
  end
  if seat == old then return end
  if old then redis.call('ZREM', seats, old) end
  if seat then
    redis.call('HSET', tenant_key(tenant), field, seat)
  else
    redis.call('HDEL', tenant_key(tenant), field)
  end
end

-- Notes that a job was lifted out of the lowest band and waits in the one above it; of each tenant one does.
local function note_lifted(job)
  redis.call('HSET', tenant_key(job.tenant), 'lifted', seat_at(job.arrival, job.id))
  rank_tenant(AGING_BAND, job.tenant)
end

local function forget_lifted(job)
  rank_lifted(job.tenant, seat_at(job.arrival, job.id), false)
  redis.call('HDEL', tenant_key(job.tenant), 'lifted')
end

-- Returns the job of a tenant that was lifted out of a band and waits for its turn, or nil. A gateway of an
-- earlier version leaves the name of one that waits no more, and the seat of a tenant that has reached its cap.
local function lifted_from(band, tenant)
  if band ~= AGING_BAND then return nil end
  local _, free, _, lifted = seat_of(band, tenant)
  if not lifted or free == 0 then return nil end
  local id = tenant_of(lifted)
  return redis.call('ZSCORE', PREFIX .. 'waiting:' .. AGED_BAND .. ':' .. tenant, id) and id or nil
end

local function rank_everywhere(tenant)
  for _, band in ipairs(BANDS) do rank_tenant(tostring(band), tenant) end
end

-- Counts a job of a tenant that has begun or ceased to run. At its cap a tenant loses its seats, and a job
-- that ends brings them back.
local function count_running(tenant, delta)
  add_count('tenant:' .. tenant, 'running', delta)
  if redis.call('HEXISTS', tenant_key(tenant), 'cap') == 1 then rank_everywhere(tenant) end
end

-- Takes in what a tenant may run at once, as its newest job says; empty: no bound.
local function set_cap(tenant, cap)
  local known = redis.call('HGET', tenant_key(tenant), 'cap') or ''
  if known == cap then return end
  if cap == '' then
    redis.call('HDEL', tenant_key(tenant), 'cap')
  else
    redis.call('HSET', tenant_key(tenant), 'cap', cap)
  end
  rank_everywhere(tenant)
end

-- A tenant that had nothing waiting in a band has something now. It enters at the floor or its own counter,
-- whichever is higher: idleness earns no credit.
local function enter_band(band, tenant)
  local floor = tonumber(redis.call('HGET', PREFIX .. 'floors', band) or 0)
  local own = tonumber(redis.call('ZSCORE', PREFIX .. 'served:' .. band, tenant) or floor)
  redis.call('ZADD', PREFIX .. 'served:' .. band, math.max(own, floor), tenant)
  local slack = string.format('%.17g', math.max(own - floor, 0))
  redis.call('HSET', PREFIX .. 'entered:' .. band, tenant, next_number() .. ' ' .. slack)
end

local function entry_of(band, tenant)
  local text = redis.call('HGET', PREFIX .. 'entered:' .. band, tenant)
  if not text then return nil end
  local entry, slack = string.match(text, '^(%d+) (.+)$')
  return entry, tonumber(slack)
end

-- A tenant is charged outside its turn, perhaps with nothing else waiting in the band.
local function enter_unless_waiting(band, tenant)
  if redis.call('EXISTS', PREFIX .. 'waiting:' .. band .. ':' .. tenant) == 0 then enter_band(band, tenant) end
end

-- Charges what a job has used that ends while it waits, after it has left its line.
local function charge_waiting(job, used_tokens)
  enter_unless_waiting(job.band, job.tenant)
  local amount = string.format('%.17g', used_tokens / tonumber(job.weight))
  redis.call('ZINCRBY', PREFIX .. 'served:' .. job.band, amount, job.tenant)
  rank_tenant(job.band, job.tenant)
end

-- Charges a grant by its estimate; the floor rises to the least counter of those that wait.
local function charge_grant(job)
  local band, tenant = job.band, job.tenant
  if job.pin == '' then
    local least = tonumber(redis.call('ZRANGE', PREFIX .. 'tenants:' .. band, 0, 0, 'WITHSCORES')[2])
    local floor = tonumber(redis.call('HGET', PREFIX .. 'floors', band) or 0)
    if least > floor then redis.call('HSET', PREFIX .. 'floors', band, string.format('%.17g', least)) end
  else
    -- Its turn is none of the line's, and its tenant may have no other job there.
    enter_unless_waiting(band, tenant)
  end
  job.charged = string.format('%.17g', tonumber(job.cost) / tonumber(job.weight))
  job.entry = entry_of(band, tenant)
  redis.call('ZINCRBY', PREFIX .. 'served:' .. band, job.charged, tenant)
  -- The job leaves no line by which its tenant would be ranked anew.
  if job.pin ~= '' then rank_tenant(band, tenant) end
end

-- Replaces what a grant was charged by what it used. Of a charge from before the tenant's last entry no more is
-- taken back than it stood above the floor then: the floor has forgiven the rest already, and nobody shall earn
-- credit by asking for more than it uses.
local function correct_charge(job, used_tokens)
  if (job.charged or '') == '' then return end
  local band, tenant = job.band, job.tenant
  local delta = used_tokens / tonumber(job.weight) - tonumber(job.charged)
  local entry, slack = entry_of(band, tenant)
  job.charged = ''
  if not entry then return end
  if entry ~= job.entry and delta < 0 then
    local given = math.min(slack, -delta)
    slack, delta = slack - given, -given
    redis.call('HSET', PREFIX .. 'entered:' .. band, tenant, entry .. ' ' .. string.format('%.17g', slack))
  end
  redis.call('ZINCRBY', PREFIX .. 'served:' .. band, string.format('%.17g', delta), tenant)
  rank_tenant(band, tenant)
end

-- Counts a job into its band or out of it. When nothing waits or runs there, the shares begin anew.
local function count_live(band, delta)
  if add_count('live', band, delta) == 0 then
    redis.call('DEL', PREFIX .. 'served:' .. band, PREFIX .. 'entered:' .. band)
    redis.call('HDEL', PREFIX .. 'floors', band)
    -- The counters by which lifted jobs have their turn there are among those that are forgotten.
    local lifted = PREFIX .. 'tenants:lifted'
    if band == AGING_BAND then redis.call('ZUNIONSTORE', lifted, 1, lifted, 'WEIGHTS', 0) end
  end
end

-- Forgets tenants that stand below the floor with nothing waiting: they would enter at the floor anyway.
local function prune_shares(looks)
  for _, band in ipairs(BANDS) do
    local served, floor = PREFIX .. 'served:' .. band, redis.call('HGET', PREFIX .. 'floors', band)
    local below = floor and redis.call('ZRANGEBYSCORE', served, '-inf', floor, 'LIMIT', 0, looks) or {}
    for _, tenant in ipairs(below) do
      if redis.call('EXISTS', PREFIX .. 'waiting:' .. band .. ':' .. tenant) == 0 then
        redis.call('ZREM', served, tenant)
        redis.call('HDEL', PREFIX .. 'entered:' .. band, tenant)
      end
    end
  end
end

-- Returns used and reserved tokens of a tenant's minute, and the number of that minute.
local function read_account(tenant)
  local window = math.floor(NOW / WINDOW_MS)
  local account = redis.call('HMGET', PREFIX .. 'quota:' .. tenant, 'window', 'used', 'reserved')
  local used = tonumber(account[1] or -1) == window and tonumber(account[2]) or 0
  return used, tonumber(account[3] or 0), window
end

-- Reserves a job's estimate, or replaces a reservation by what was used.
local function book_tokens(tenant, reserved_delta, used_delta)
  local key = PREFIX .. 'quota:' .. tenant
  local used, reserved, window = read_account(tenant)
  reserved = math.max(0, reserved + reserved_delta)
  redis.call('HSET', key, 'window', window, 'used', used + used_delta, 'reserved', reserved)
  if reserved > 0 then redis.call('PERSIST', key) else redis.call('PEXPIRE', key, ACCOUNT_TTL_MS) end
end
