"""Figures of runs and comparisons: functions from rows to a figure and the numbers in it."""
