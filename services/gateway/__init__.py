"""The gateway: speaks text with clients and token ids with workers, and owns each request until its end."""
