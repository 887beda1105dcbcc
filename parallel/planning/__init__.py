"""Decisions about parallel training, as pure functions: where experts live, how work is cut."""
