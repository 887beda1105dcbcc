"""Errors of the disk and of torch.distributed.checkpoint, as one sentence."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException

from ...errors import CheckpointError
from ...parallel.watch.lost_rank import last_line


@contextmanager
def as_checkpoint_error(path: Path) -> Iterator[None]:
    """Raise what goes wrong on any rank while ``path`` is written as a :class:`CheckpointError`."""
    try:
        yield
    except (OSError, CheckpointException) as error:
        for cause in _causes(error):
            if isinstance(cause, CheckpointError):
                raise cause from None
        raise CheckpointError(
            f"checkpoint {path} could not be written ({reason(error)}), but the previous one is "
            "untouched; free space or repair the disk."
        ) from error


def reason(error: OSError | CheckpointException) -> str:
    """Return the disk's error message, or the last line of another error.

    Raises what is not an error, such as Ctrl-C.
    """
    causes = _causes(error)
    for cause in causes:
        if not isinstance(cause, Exception):
            raise cause from None
    for cause in causes:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror.lower()
    return last_line(causes[0])


@contextmanager
def quiet_about_one_process() -> Iterator[None]:
    """DCP warns when it runs without a process group, which is what we want there."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _causes(error: OSError | CheckpointException) -> list[BaseException]:
    """Return the errors of the ranks that failed."""
    if isinstance(error, CheckpointException):
        return [failure[0] for failure in error.failures.values()]
    return [error]
