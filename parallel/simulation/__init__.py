"""A training step on a cluster that is not there: its time and memory, from formulas."""
