-- length(expects_route)
-- Returns how many jobs wait; -1 where the caller knows of a route and workers, and here are none: whoever lends
-- slots without Redis meanwhile would find none to lend here.

if ARGV[6] == '1' and not (has_route() and redis.call('EXISTS', PREFIX .. 'workers') == 1) then return -1 end
return count_waiting()
