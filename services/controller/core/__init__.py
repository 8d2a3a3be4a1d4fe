"""The controller's decisions, pure: who is a member, which revision it shall hold, what the route says."""
