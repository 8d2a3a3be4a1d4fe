-- book(tenant, nonce, used_tokens, job_id | '')
-- Charges a tenant's minute for what was used while the caller could not reach Redis: once, however often it is said
-- with the same nonce. Without effect where the job is known, whose end charges it.
-- Returns nothing.

local tenant, nonce, used_tokens, id = ARGV[6], ARGV[7], tonumber(ARGV[8]), ARGV[9]

if id ~= '' and redis.call('EXISTS', PREFIX .. 'job:' .. id) == 1 then return end
if redis.call('SET', PREFIX .. 'booked:' .. nonce, '1', 'NX', 'PX', RECORD_MS) then
  book_tokens(tenant, 0, used_tokens)
end
