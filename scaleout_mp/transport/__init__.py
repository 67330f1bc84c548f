"""The way to the network: REST, tokens, gRPC calls, model streams and the outbox. Knows nothing of tasks."""
