"""The run directory: what is in it, checkpoints, and models built from it."""
