"""The short way of a stream from a replica to Ray's HTTP proxy on the same machine."""
