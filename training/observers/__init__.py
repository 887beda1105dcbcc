"""Who sees what a run does."""
