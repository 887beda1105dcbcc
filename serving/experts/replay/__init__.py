"""Recorded routes through a store without weights and disk: what would other settings cost?"""
