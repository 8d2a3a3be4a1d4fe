"""The whole mesh on one machine: starts and supervises Redis, controller, workers, gateways and Envoy."""
