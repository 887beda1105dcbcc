"""Experts on disk and in slots."""
