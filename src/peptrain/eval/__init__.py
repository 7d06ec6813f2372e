"""Evaluation of a run's dense twin, so that all methods are measured with one ruler."""
