"""What an engine adds to guesses of next tokens: checks of options, counters, joined events."""
