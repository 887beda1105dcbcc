"""Checkpoints, exports, and starts from a model folder."""
