"""Building blocks of configurations: fields with defaults and intervals, and strict TOML."""
