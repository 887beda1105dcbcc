"""One run on this machine: its folder, its starts, and checks that all ranks agree."""
