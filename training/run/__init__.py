"""One run on this machine: its folder, its starts, how it stops."""
