"""The folder of a run, and the lock of the one program that trains in it."""

import fcntl
import logging
import os
from pathlib import Path

import yaml

from ...errors import ConfigError
from ..config import RunConfig

log = logging.getLogger(__name__)


def create_run_folder(run_dir: Path) -> None:
    """Make the folder; raise :class:`ConfigError` if that fails."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"run_dir is {str(run_dir)!r}, which cannot be written ({error.strerror}); "
            "choose another folder."
        ) from None


def claim_run_folder(run_dir: Path) -> int:
    """Make the folder and lock it against other training programs.

    The lock ends when the returned descriptor is closed, or with the process.
    """
    create_run_folder(run_dir)
    descriptor = os.open(run_dir, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ConfigError(
            f"run_dir is {str(run_dir)!r}, which another program is training in; stop that one or "
            "choose another folder."
        ) from None
    except OSError as error:  # a file system without locks
        log.warning("run_dir %s cannot be locked: %s", run_dir, error.strerror)
    return descriptor


def dump_config(config: RunConfig) -> str:
    """Return the configuration as YAML, defaults included."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
