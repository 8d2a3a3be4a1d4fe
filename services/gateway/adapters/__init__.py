"""The gateway's ports put to work: Redis, the workers' sessions, the controller's stream, tokenizers."""
