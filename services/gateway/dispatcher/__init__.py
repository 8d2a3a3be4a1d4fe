"""The gateway's orchestrator: receives requests of every API and looks after each until it is settled."""
