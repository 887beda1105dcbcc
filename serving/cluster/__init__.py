"""The Ray that moeyard serve starts, and the processes around it."""
