"""Estimates of a run's parameters, memory and FLOPs before it starts."""
