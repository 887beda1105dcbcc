"""Garbage collection in a process that serves one model."""

import gc


def settle() -> None:
    """Let garbage collections leave out what is there now: modules, a model, a server.

    It stays until the process ends, and looking through it took 4 % of the time of a small model's
    tokens. Objects that come later are collected as before.
    """
    gc.collect()
    gc.freeze()
