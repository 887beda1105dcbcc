"""``metrics.jsonl``, the log that every run keeps."""

import json
import logging
from pathlib import Path
from typing import Any

from ...files import replace_text
from .observers import Observer

log = logging.getLogger(__name__)


class MetricsLog(Observer):
    """``metrics.jsonl``: one JSON object per line, steps strictly rising.

    On resume, lines after the checkpoint's step are removed, so that no step appears twice.
    """

    def __init__(self, folder: Path, resume_step: int) -> None:
        path = folder / "metrics.jsonl"
        kept = _lines_up_to(path, resume_step) if path.exists() else []
        replace_text(path, "".join(kept))
        self._file = path.open("ab", buffering=0)
        self._unwritten = b""

    def record(self, record: dict[str, Any]) -> None:
        """Append one record; on a full disk, keep it and try again with the next record."""
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
