"""GPU node pools on three clouds; so far the catalogue of their machines and prices."""
