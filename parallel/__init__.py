"""Ranks: the mesh, token dispatch, and the reduction of gradients."""
