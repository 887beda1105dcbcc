"""Continuous batching, from requests to text."""
