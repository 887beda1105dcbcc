"""The folder that a run publishes into and servers follow: a folder for each version."""

import re
import shutil
from pathlib import Path

from ...errors import ModelFileError
from .manifest import Manifest, UpdateError, read_manifest

WANT_FULL = "want-full"
"""A server that lacks a version makes this file, and the next version is a full snapshot."""


class UpdatesFolder:
    """The versions in a folder, which may not be there yet."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def of(self, version: int) -> Path:
        """Return where a version is, or will be."""
        return self.path / f"version-{version:08d}"

    def versions(self) -> list[int]:
        """Return the versions that are there, oldest first."""
        if not self.path.is_dir():
            return []
        found = (re.fullmatch(r"version-(\d{8})", path.name) for path in self.path.iterdir())
        return sorted(int(match[1]) for match in found if match is not None)

    def manifest(self, version: int) -> Manifest:
        """Return what a version says; raises :class:`UpdateError` if it is damaged."""
        return read_manifest(self.of(version), version)

    def prune(self, keep: int) -> None:
        """Delete what is older than the ``keep`` newest full snapshots.

        Damaged versions do not count, and go with those next to them.
        """
        full = [version for version in self.versions() if self._is_full(version)]
        if len(full) <= keep:
            return
        for version in self.versions():
            if version < full[-keep]:
                # Hidden first: a reader never meets a folder that is only half there.
                hidden = self.path / f".old-{self.of(version).name}"
                self.of(version).rename(hidden)
                shutil.rmtree(hidden)

    def clear_unfinished(self) -> None:
        """Make the folder, and delete what a killed publisher left.

        Raises :class:`ModelFileError` where that cannot be done.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for pattern in (".version-*.tmp", ".old-version-*"):
                for leftover in self.path.glob(pattern):
                    shutil.rmtree(leftover)
        except OSError as error:
            raise ModelFileError(
                f"{self.path} cannot be written ({error.strerror}); choose another folder."
            ) from None

    def ask_for_full(self) -> bool:
        """Ask the publisher for a full snapshot; False where this folder may only be read."""
        try:
            (self.path / WANT_FULL).touch()
        except OSError:
            return False
        return True

    def wants_full(self) -> bool:
        """Say whether a server asks for a full snapshot."""
        return (self.path / WANT_FULL).exists()

    def answer_wish(self) -> None:
        """Forget the wish for a full snapshot: one is there."""
        (self.path / WANT_FULL).unlink(missing_ok=True)

    def _is_full(self, version: int) -> bool:
        try:
            return self.manifest(version).is_full
        except UpdateError:
            return False
