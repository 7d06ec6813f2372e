"""Pure mathematics: tensors in, tensors out. Each file is tested against a float64 oracle."""
