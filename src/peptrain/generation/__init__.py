"""Text that a model writes: continuations of a prompt, sampled by transformers."""
