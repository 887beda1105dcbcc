"""``moeyard sparsify``: a dense model becomes one whose tokens decide how many experts run."""
