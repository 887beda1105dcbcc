"""Where slots are filled from: one file per tier."""
