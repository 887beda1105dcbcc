"""Logs and monitors of a run."""
