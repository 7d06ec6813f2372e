"""Pure functions of tensors. Each file is tested against a float64 oracle."""
