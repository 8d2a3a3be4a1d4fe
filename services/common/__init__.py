"""What two or more services share. Knows no service; `errors` and `clock` are pure, for the cores."""
