"""The model section of a configuration."""
