"""Training: data, optimizer, loop, checkpoints, run folder. Start with python -m moeyard.training."""
