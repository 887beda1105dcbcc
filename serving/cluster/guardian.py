"""A parent for work that starts processes: none of them outlives it, whatever happens.

``moeyard serve`` is three processes: the one the user started, the guardian, and the one that runs
Ray. The kernel gives the guardian every orphan below it (``PR_SET_CHILD_SUBREAPER``). So it can end
Ray's agents, which notice too late, or never, that Ray is gone. The kernel also tells it when the
user's process dies, even by ``kill -9`` (``PR_SET_PDEATHSIG``), and it then ends everything. Each
attempt is a fresh process, so a start that failed halfway leaves nothing behind for the next.

Linux only: elsewhere the work runs in the user's process, once. Imports nothing heavy, since what
is imported before the fork is in memory three times.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

TRY_AGAIN = 75
"""EX_TEMPFAIL of sysexits.h: the status of work that a fresh process should do again."""
ATTEMPTS = 3

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
PARENT_DIED = signal.SIGUSR1
"""What the kernel sends to the guardian when the user's process has gone."""
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that ask the work to stop; they are passed on to it."""
IDLE_WORKER = "ray::IDLE"
"""How Ray names a worker process that it has not given anything to do."""
SPARE_ORDER = "MOEYARD_SPARE_ORDER"
"""Environment variable of Ray's processes: the path of a file that is there while a spare worker is
ordered (``spare_worker.py``)."""


def run_guarded(work: Callable[[int], int]) -> int:
    """Run ``work`` and return its status; afterwards nothing that it started is alive.

    ``work`` gets the number of the attempt, from 1. SIGINT, SIGTERM and SIGHUP that reach this
    process are passed on to it, once each. While it returns :data:`TRY_AGAIN`, it runs again,
    :data:`ATTEMPTS` times in all. Call this before any thread has been started.
    """
    if sys.platform != "linux":
        return work(ATTEMPTS)
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {*STOPPING, signal.SIGCHLD, PARENT_DIED})
    _prctl(PR_SET_CHILD_SUBREAPER, 1)  # for the case that the guardian itself is killed
    guardian = os.fork()
    if guardian == 0:
        _guard(work, parent, mask)
    status = _wait_for(guardian, stopping_signals())
    _end_children()
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return _told(status)


def stopping_signals() -> set[signal.Signals]:
    """Return the signals that ask to stop; not SIGHUP under nohup, which ignores it."""
    ignores_hangup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return set(STOPPING) - ({signal.SIGHUP} if ignores_hangup else set())


def _guard(work: Callable[[int], int], parent: int, mask: set[int | signal.Signals]) -> NoReturn:
    """Run the attempts, and end what each leaves behind."""
    os.setpgid(0, 0)  # Ctrl-C reaches the user's process alone, which passes it on
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    _prctl(PR_SET_PDEATHSIG, PARENT_DIED)
    status = TRY_AGAIN
    for attempt in range(1, ATTEMPTS + 1):
        if os.getppid() != parent:
            break
        guardian = os.getpid()
        child = os.fork()
        if child == 0:
            _work(work, attempt, guardian, mask)
        status = _wait_for(child, {*STOPPING, PARENT_DIED})
        _end_children()
        if status != TRY_AGAIN:
            break
    if os.getppid() != parent:
        os._exit(1)  # no one is left to be told
    os._exit(_told(status))


def _work(
    work: Callable[[int], int], attempt: int, guardian: int, mask: set[int | signal.Signals]
) -> NoReturn:
    """Run one attempt in this process; the guardian ends what it leaves behind."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != guardian:
        os._exit(1)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    status = 1
    try:
        status = work(attempt)
    except BaseException:  # as the interpreter would, had it not been forked
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _wait_for(child: int, signals: set[signal.Signals]) -> int:
    """Pass signals on until ``child`` ends; return its exit status, or minus its signal."""
    while True:
        number = signal.sigwait({*signals, signal.SIGCHLD})
        if number == PARENT_DIED:
            return -signal.SIGKILL
        if number != signal.SIGCHLD:
            os.kill(child, number)
            continue
        while True:  # one SIGCHLD may stand for several, and orphans come here too
            try:
                ended, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if ended == child:
                return os.waitstatus_to_exitcode(status)
            if ended == 0:
                break


def _end_children() -> None:
    """Kill children, and their orphans as they arrive, until there are none."""
    while True:
        for child, _, _ in children(os.getpid()):
            try:
                os.kill(child, signal.SIGKILL)
            except ProcessLookupError:
                continue
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def children(parent: int) -> list[tuple[int, str, str]]:
    """Return process id, name and state (Z: ended) of each child; none where there is no /proc."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, _, rest = path.read_text(errors="replace").partition(" (")
        except OSError:  # the process has ended
            continue
        name, _, values = rest.rpartition(") ")
        state, ppid = values.split()[:2]
        if int(ppid) == parent:
            found.append((int(pid), name, state))
    return found


def _told(status: int) -> int:
    """Turn a death by a signal into a status; report it unless the signal asked to stop."""
    if status >= 0:
        return status
    if -status in STOPPING:
        return 128 - status
    name = signal.Signals(-status).name
    sys.stderr.write(f"error: the server's process was ended by {name}; everything has stopped.\n")
    sys.stderr.flush()
    return 1


def _prctl(option: int, value: int) -> None:
    zero = ctypes.c_ulong(0)
    library = ctypes.CDLL(None, use_errno=True)
    if library.prctl(option, ctypes.c_ulong(value), zero, zero, zero) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")
