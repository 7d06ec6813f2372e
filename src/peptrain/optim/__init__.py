"""Optimizers, their settings, and learning-rate schedules."""
