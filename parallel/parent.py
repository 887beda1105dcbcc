"""Die with the parent process. Imports nothing heavy: it must act before torch is loaded."""

import ctypes
import os
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1
INIT = 1


def is_torchrun_worker() -> bool:
    """Say whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent dies, so that no worker outlives torchrun.

    A process whose parent is now init has already lost its parent, so it ends immediately. In a
    container, torchrun itself may be process 1.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == INIT and not _is_launcher(INIT):
        os.kill(os.getpid(), signal.SIGKILL)


def _is_launcher(pid: int) -> bool:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return b"torch" in command or b"moeyard" in command
