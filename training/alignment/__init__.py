"""Preferences between generated sessions: the reward model, and the pairs it picks."""
