"""A run as a directory for others."""
