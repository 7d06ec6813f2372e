"""Hugging Face models: building them, their matrices, their dense weights, what they compute."""
