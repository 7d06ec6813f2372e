"""A package that can't be imported. test_outside.py installs it."""

raise ImportError("its own library is missing")
