"""Which systems moeyard runs on. Imports nothing heavy, so that a program can ask first."""

import sys


def stop_unless_it_can_run() -> None:
    """End the program on Windows with a sentence; on other systems but Linux, say what to expect.

    Training and serving need file locks, signals and process groups, which Windows lacks.
    """
    if sys.platform == "win32":
        sys.stderr.write(
            "error: the system is Windows, where moeyard does not run; use Linux, WSL 2 or a Linux "
            "container.\n"
        )
        raise SystemExit(2)
    if sys.platform != "linux":
        sys.stderr.write(
            f"note: the system is {sys.platform}, but moeyard is tried on Linux alone; in case of "
            "doubt, use a Linux machine or container.\n"
        )
