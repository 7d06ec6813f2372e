"""Evaluation of a run's dense twin. Never imports the trainer."""
