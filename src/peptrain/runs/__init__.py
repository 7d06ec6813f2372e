"""The run directory, its checkpoints, and models built from them."""
