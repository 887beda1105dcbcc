"""Every rank knows that the others live."""
