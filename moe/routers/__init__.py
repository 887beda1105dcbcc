"""Routers: one file each, with the values and losses they share."""
