"""Attention: grouped-query and latent, rotary positions, and which rows attend together."""
