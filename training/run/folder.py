"""The folder of a run: merged configuration, metrics, checkpoints."""

import fcntl
import json
import logging
import os
from pathlib import Path
from typing import Any

import yaml

from ...errors import ConfigError
from ...files import replace_text
from ..config import RunConfig
from ..observers.observers import Observer

log = logging.getLogger(__name__)


def create_run_folder(run_dir: Path) -> None:
    """Make the folder, or say why it cannot be."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"run_dir is {str(run_dir)!r}, which cannot be written ({error.strerror}); "
            "choose another folder."
        ) from None


def claim_run_folder(run_dir: Path) -> int:
    """Make the folder and keep other programs from training in it.

    The claim ends when the returned descriptor is closed, at the latest with the process.
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


class MetricsLog(Observer):
    """``metrics.jsonl``: one JSON object per line, steps strictly rising.

    On resume, lines past the checkpoint are cut off, so that no step is there twice.
    """

    def __init__(self, folder: Path, resume_step: int) -> None:
        path = folder / "metrics.jsonl"
        kept = _lines_up_to(path, resume_step) if path.exists() else []
        replace_text(path, "".join(kept))
        self._file = path.open("ab", buffering=0)
        self._unwritten = b""

    def record(self, record: dict[str, Any]) -> None:
        """Append one record; on a full disk, keep it until there is room for the next."""
        has_failed = bool(self._unwritten)
        self._unwritten += json.dumps(record).encode() + b"\n"
        try:
            while self._unwritten:
                written = self._file.write(self._unwritten)
                self._unwritten = self._unwritten[written:]
        except OSError as error:
            if not has_failed:
                reason = (error.strerror or str(error)).lower()
                log.warning(
                    "%s cannot be written (%s); its lines wait for room.", self._file.name, reason
                )

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _lines_up_to(path: Path, step: int) -> list[str]:
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            is_kept = json.loads(line)["step"] <= step
        except (ValueError, TypeError, KeyError):
            break  # a killed run may leave half a line
        if is_kept:
            kept.append(line + "\n")
    return kept
