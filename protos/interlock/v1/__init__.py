"""The contract, version 1: messages in `*_pb2`, stubs in `*_service_pb2_grpc`."""
