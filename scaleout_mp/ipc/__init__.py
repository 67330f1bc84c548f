"""The control channel: frames over a Unix socketpair, file descriptors beside them, values that cross over."""
