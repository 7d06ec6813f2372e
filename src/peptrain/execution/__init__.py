"""How a model is run in training, fast, with the same results."""
