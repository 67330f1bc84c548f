"""Write the model that the session starts from."""

import sys

import numpy as np
from client import get_weights, make_network

np.savez(sys.argv[1] if len(sys.argv) > 1 else "seed.npz", *get_weights(make_network()))
