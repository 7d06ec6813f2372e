"""What configurations share: fields with their defaults and intervals, and strict TOML."""
