"""Experts with pruned groups: what stays learns to make up for what goes, layer by layer."""
