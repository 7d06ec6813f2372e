"""Figures and reports of runs and comparisons as files."""
