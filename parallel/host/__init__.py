"""Ranks of one host: shared memory and waiting."""
