"""Guesses of a text's next tokens, which a step checks: answers come sooner and do not change."""
