"""The training program, one rank of which comes to grief at a known place.

    CHAOS="RANK PLACE HARM" victim.py CONFIG [a.b=c ...]

PLACE: start, joined, data, step, write, commit, evaluate, leave. HARM: stop (SIGSTOP), kill
(SIGKILL), sleep (its main thread gets nowhere while its others run), lock (it holds Python's lock
for ``CHAOS_LOCK_S`` seconds), error (a bug's exception), nan (a weight of an expert, at a step).
"""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

RANK, PLACE, HARM = os.environ["CHAOS"].split()
is_victim = os.environ.get("RANK") == RANK


def harm(arguments: tuple[Any, ...]) -> None:
    """Do it, once: a restarted attempt goes on unharmed."""
    if not is_victim or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        return
    sys.stderr.write(
        f"event=harm rank={RANK} place={PLACE} harm={HARM} pid={os.getpid()} time={time.time()}\n"
    )
    sys.stderr.flush()
    if HARM == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif HARM == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif HARM == "sleep":
        time.sleep(3600)
    elif HARM == "lock":
        ctypes.PyDLL(None).sleep(int(os.environ["CHAOS_LOCK_S"]))  # a PyDLL call keeps the lock
    elif HARM == "nan":
        step, *_ = arguments
        step.gradients.experts[0].data.view(-1)[0] = float("nan")
    elif HARM == "error":
        raise AttributeError("a bug that chaos made up")
    else:
        raise SystemExit(f"CHAOS has the unknown harm {HARM}")


def before(owner: Any, name: str, turn: int = 1) -> None:
    """Come to grief as ``owner.name`` is called for the ``turn``-th time."""
    original: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def harmed(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == turn:
            harm(arguments)
        return original(*arguments, **options)

    setattr(owner, name, harmed)


def main() -> int:
    """Arm the place and train."""
    from moeyard.parallel.parent import die_with_parent

    die_with_parent()
    from torch.distributed.checkpoint import filesystem

    from moeyard.parallel.watch.watch import Watch
    from moeyard.training import __main__ as program
    from moeyard.training import setup, trainer
    from moeyard.training.checkpoints.folder import StepsFolder
    from moeyard.training.step import TrainStep

    places = {
        "start": (program, "process_group", 1),
        "joined": (program, "build_mesh", 1),
        "data": (setup, "prepare_shards" if RANK == "0" else "open_shards", 1),
        "step": (TrainStep, "run", 3),
        "write": (filesystem.FileSystemWriter, "write_data", 1),
        "commit": (StepsFolder, "commit", 1),
        "evaluate": (trainer, "evaluate", 1),
        "leave": (Watch, "leave", 1),
    }
    before(*places[PLACE])
    return program.main(sys.argv[1:])


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)  # as the program itself does
