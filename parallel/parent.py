"""Die with the parent process. Imports nothing heavy: it must act before torch is loaded."""

import ctypes
import os
import signal
import sys
import threading
import time
from pathlib import Path

PR_SET_PDEATHSIG = 1
INIT = 1
LOOK_EVERY_S = 0.5
"""How often a process looks for its parent where the kernel cannot be asked to tell."""


def is_torchrun_worker() -> bool:
    """Say whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def die_with_parent() -> None:
    """Let this process be killed when its parent dies, so that no worker outlives torchrun.

    Linux can do so, but its signal comes when the THREAD ends that started this process. A main
    thread ends with its process. Where another thread started us, a thread looks for the parent.

    A process whose parent is now init has already lost its parent, so it ends immediately. In a
    container, torchrun itself may be process 1.
    """
    parent = os.getppid()
    if sys.platform == "linux" and _is_child_of_main_thread(parent):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_die_after, args=(parent,), name="parent", daemon=True).start()
    if os.getppid() == INIT and not _is_launcher(INIT):
        os.kill(os.getpid(), signal.SIGKILL)


def _is_child_of_main_thread(parent: int) -> bool:
    """Say whether the parent's main thread started this process; False if that is unknown."""
    try:
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text(encoding="ascii")
    except OSError:
        return False
    return str(os.getpid()) in children.split()


def _die_after(parent: int) -> None:
    """Kill this process when another one has become its parent."""
    while os.getppid() == parent:
        time.sleep(LOOK_EVERY_S)
    os.kill(os.getpid(), signal.SIGKILL)


def _is_launcher(pid: int) -> bool:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return b"torch" in command or b"moeyard" in command
