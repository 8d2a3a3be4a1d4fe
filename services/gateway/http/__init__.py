"""The gateway's HTTP face: JSON and server-sent events over the same reception as gRPC."""
