"""An update that is open: its units, each compared with its hash when it is read."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from ...errors import ModelFileError
from ..folders.expert_hashes import Key as ExpertKey
from ..folders.expert_layouts import ExpertViews
from ..folders.expert_read import ExpertRead, GetBuffer
from ..folders.extents import disk_order
from ..folders.families.family import Family
from ..folders.file_reader import buffer_of
from ..folders.tensor_files import WEIGHTS, TensorFiles
from .manifest import Manifest, UpdateError


class OpenUpdate:
    """The weights of an update of a ``family``; reading is thread-safe.

    The file stays readable when the publisher deletes the update, until :meth:`close`.
    """

    def __init__(self, path: Path, manifest: Manifest, family: Family) -> None:
        """Raises :class:`UpdateError` for a file that is missing or damaged."""
        self.manifest, self._path, self._family = manifest, path, family
        self._hashes = _UnitHashes(manifest)
        try:
            self._files = TensorFiles(path)
        except ModelFileError as error:
            raise self._error(str(error).removesuffix(".")) from None
        try:
            self._check_header()
        except UpdateError:
            self.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._files.close()

    def dense(self, parameter: str) -> Tensor:
        """Return a tensor outside the experts in its stored type; raises :class:`UpdateError`."""
        name = self._family.tensor_name(parameter)
        try:
            entry = self._files.entry(name)
            tensor = torch.empty(entry.shape, dtype=entry.dtype)
            self._files.read_into(name, tensor)
        except (ModelFileError, OSError) as error:
            raise self._error(str(error).removesuffix(".")) from None
        digest = xxhash.xxh3_64_intdigest(buffer_of(tensor).view)
        if digest != self.manifest.units[parameter].digest:
            raise self._error(f"{name} has other bytes than its hash says")
        return tensor

    def read_expert(self, key: ExpertKey, views: ExpertViews) -> None:
        """Fill an expert's ``views``; raises :class:`UpdateError`."""
        self._run(lambda: [step() for step in self.expert_steps(key, views)])

    def check_expert(self, key: ExpertKey, views: ExpertViews) -> None:
        """Read an expert and put it nowhere; ``views`` need no memory. Raises as above."""
        self._run(lambda: self._expert_read(key, views).check())

    def expert_steps(
        self, key: ExpertKey, views: ExpertViews, buffer_of_slot: GetBuffer = buffer_of
    ) -> list[Callable[[], None]]:
        """Do what :meth:`ModelFolder.expert_reads` does."""
        return self._expert_read(key, views, buffer_of_slot).steps()

    def _expert_read(
        self, key: ExpertKey, views: ExpertViews, buffer_of_slot: GetBuffer = buffer_of
    ) -> ExpertRead:
        pieces = self._family.experts.pieces(self._files, *key, views)
        order = disk_order(pieces)
        return ExpertRead(key, pieces, order, self._hashes, False, buffer_of_slot)

    def _run(self, read: Callable[[], object]) -> None:
        try:
            read()
        except (ModelFileError, OSError) as error:
            raise self._error(str(error).removesuffix(".")) from None

    def _check_header(self) -> None:
        """Compare the header with its hash: it says which bytes belong to which tensor."""
        try:
            with (self._path / WEIGHTS).open("rb") as file:
                first = file.read(8)
                digest = xxhash.xxh3_64_intdigest(
                    first + file.read(int.from_bytes(first, "little"))
                )
        except OSError as error:
            raise self._error(f"{WEIGHTS} cannot be read ({error.strerror})") from None
        if digest != self.manifest.header:
            raise self._error(f"{WEIGHTS} has another header than its hash says")

    def _error(self, reason: str) -> UpdateError:
        version = self.manifest.version
        return UpdateError(
            version,
            f"{self._path} cannot be used ({reason}); the version before stays until the next "
            "whole one.",
        )


@dataclass(frozen=True, slots=True)
class _UnitHashes:
    """The hashes of an update's experts."""

    manifest: Manifest
    source = "update.json says"
    remedy = "a full snapshot has all of them again"

    def get(self, key: ExpertKey) -> int | None:
        """Return the hash of an expert."""
        return self.manifest.units[key].digest

    def learn(self, key: ExpertKey, digest: int) -> None:
        """Do nothing: the update knows all its units."""
