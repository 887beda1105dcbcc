"""Every rank knows whether the others are alive."""
