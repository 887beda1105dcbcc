"""Measure links and experts on the ranks of a run."""
