"""How the worker touches the world: torch for the model, gRPC for the controller, files for revisions."""
