"""Updates of a model that is served while it is trained: their format, and which to apply."""
