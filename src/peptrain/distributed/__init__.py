"""Training in one process or in several."""
