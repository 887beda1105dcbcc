"""Who wraps and reduces dense parameters."""
