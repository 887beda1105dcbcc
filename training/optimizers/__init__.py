"""Optimizers: what updates the weights of a run, and what that keeps between steps."""
