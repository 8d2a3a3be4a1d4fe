-- usage(tenant)
-- Tells what a tenant takes now.
-- Returns {ms since its minute began, used tokens, reserved tokens, running jobs}.

local used, reserved = read_account(ARGV[6])
local running = redis.call('HGET', tenant_key(ARGV[6]), 'running')
return { NOW % WINDOW_MS, used, reserved, tonumber(running or 0) }
