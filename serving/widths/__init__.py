"""A width for each expert: how much each matters, and how many may have few bits."""
