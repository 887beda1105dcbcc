"""Check at the start that all ranks share one run folder.

With separate folders, hosts would train to the end and leave checkpoints that lack the parts of
other hosts.
"""

import secrets
import time
from pathlib import Path

from ...errors import ConfigError
from ...parallel.watch.watch import Watch

SEEN_WITHIN_S = 10.0
"""A network file system may take this long to show what another host wrote."""
LOOK_EVERY_S = 0.1


def check_shared_folder(run_dir: Path, watch: Watch | None) -> None:
    """Raise :class:`ConfigError` on all ranks unless each sees what the others write there.

    Files have new names each time, because network file systems cache for a while that a name does
    not exist.
    """
    if watch is None or watch.world_size == 1:
        return
    question = watch.on_rank_0(lambda: _ask(run_dir))
    answers = watch.gather(None if watch.rank == 0 else _answer(run_dir, question, watch.rank))

    def judge() -> None:
        try:
            for rank, problem in enumerate(answers):
                if rank > 0 and problem is None and not _appears(_reply(run_dir, question, rank)):
                    problem = "wrote a file that does not appear there on rank 0's host"
                if problem is not None:
                    raise ConfigError(
                        f"run_dir is {str(run_dir)!r}, and {watch.where(rank)} {problem}; put "
                        "run_dir on a file system that all hosts share, because each rank writes "
                        "its part of a checkpoint there."
                    )
        finally:
            for file in run_dir.glob(f"{question}*"):
                file.unlink(missing_ok=True)

    watch.on_rank_0(judge)


def _ask(run_dir: Path) -> str:
    name = f".seen-{secrets.token_hex(8)}"
    try:
        (run_dir / name).touch()
    except OSError as error:
        raise ConfigError(
            f"run_dir is {str(run_dir)!r}, which cannot be written ({error.strerror}); "
            "choose another folder."
        ) from None
    return name


def _answer(run_dir: Path, question: str, rank: int) -> str | None:
    """Write a reply if rank 0's question is visible; return the problem, if there is one."""
    if not _appears(run_dir / question):
        return "does not see there what rank 0 wrote"
    try:
        _reply(run_dir, question, rank).touch()
    except OSError as error:
        return f"cannot write there ({error.strerror})"
    return None


def _reply(run_dir: Path, question: str, rank: int) -> Path:
    return run_dir / f"{question}-{rank}"


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + SEEN_WITHIN_S
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(LOOK_EVERY_S)
    return True
