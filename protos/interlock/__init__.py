"""Interlock's public package: the stubs of the contract, for clients with grpcio and protobuf alone."""
