"""What runs in Ray's HTTP proxy besides the guard. Imports neither torch nor Ray."""
