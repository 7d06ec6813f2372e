"""One process or several."""
