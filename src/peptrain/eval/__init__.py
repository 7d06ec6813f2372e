"""Evaluation of a run's dense equivalent, so that all methods are measured in the same way."""
