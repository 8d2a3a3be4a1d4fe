-- grant()
-- Lends what is free, when a worker that was held may be used again.
-- Returns the caller's grants.

grant_free()
return GRANTED
