"""Adapters in serving: low-rank updates that some rows of a batch go through and others do not."""
