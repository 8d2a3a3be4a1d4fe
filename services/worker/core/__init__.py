"""The worker's decisions, pure: which sequences run together, which jobs are taken, what noise they get."""
