"""A federated session to look at: four clients learn handwritten digits while some of their tasks misbehave."""
