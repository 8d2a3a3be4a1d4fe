-- set_route(fence, epoch, {revision, weight} ...)
-- Replaces the route in one step, which switches the model for every gateway at once.
-- Returns 1, or 0 if the fence is stale.

if is_stale() then return 0 end
local fields = { 'fence', ARGV[1], 'epoch', ARGV[2] }
for i = 3, #ARGV, 2 do
  fields[#fields + 1] = 'w:' .. ARGV[i]
  fields[#fields + 1] = ARGV[i + 1]
end
redis.call('DEL', PREFIX .. 'route')
redis.call('HSET', PREFIX .. 'route', unpack(fields))
return 1
