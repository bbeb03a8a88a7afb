"""One TOML file per published result; an architecture name starts from its recipe."""
