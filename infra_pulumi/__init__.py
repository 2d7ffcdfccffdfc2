"""GPU node pools on three clouds, from one description, with a plan that needs no cloud."""
