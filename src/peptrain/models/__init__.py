"""Hugging Face models: how to build and probe them, adapted matrices, and dense weights."""
