"""What is printed: the console, and the progress of a training on it."""
