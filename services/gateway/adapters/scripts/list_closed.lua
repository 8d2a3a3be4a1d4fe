-- list_closed(worker_id)
-- Lets the caller's jobs go to a worker again, and lends what is free.
-- Returns the caller's grants.

close_pair(CALLER, ARGV[6])
grant_free()
return GRANTED
