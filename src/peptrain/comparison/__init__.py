"""Comparisons of several runs: grids, their processes and tables, and the demo."""
