"""The ``moeyard`` commands: each file has one, its arguments and what it does."""
