"""The experts of every layer divided between several processes, of one host or of several."""
