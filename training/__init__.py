"""Training: data, optimizer, loop, checkpoints. Start it with ``python -m moeyard.training``."""
