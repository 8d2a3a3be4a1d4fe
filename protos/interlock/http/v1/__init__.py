"""The HTTP face, version 1."""
