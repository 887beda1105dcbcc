"""A server whose model continues time series: no tokens, no cache, one answer for a request."""
