-- length()
-- Returns how many jobs wait.

return count_waiting()
