"""Saves that meet a full disk, or that something else meets."""

import errno
import os

from moeyard.training.checkpoints.dcp_reader import FileSystemWriter


def steps(run) -> list[str]:
    """Return what lies in a run's folder of checkpoints."""
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def fail_writes(monkeypatch, which) -> None:
    """Let the disk be full at the saves that ``which`` names, counted from 1."""

    def full(number: int) -> None:
        if number in which:
            try:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:  # as torch's archive writer hides it
                raise RuntimeError("[enforce fail at inline_container.cc:672]")  # noqa: B904

    before_writes(monkeypatch, full)


def before_writes(monkeypatch, action) -> None:
    """Call ``action`` with the number of the save, from 1, in the thread that is about to write."""
    write, calls = FileSystemWriter.write_data, []

    def watched(self, *arguments, **options):
        calls.append(1)
        action(len(calls))
        return write(self, *arguments, **options)

    monkeypatch.setattr(FileSystemWriter, "write_data", watched)
