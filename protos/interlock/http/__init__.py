"""The HTTP face. Servers only: it needs googleapis-common-protos, which clients need not have."""
