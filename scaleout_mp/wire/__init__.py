"""The messages and call paths of the Scaleout Edge wire protocol."""
