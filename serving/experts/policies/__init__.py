"""Which expert leaves its slot when another one needs it: one file per rule."""
