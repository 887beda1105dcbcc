"""Checkpoints that are whole or absent, and independent of the number of ranks.

A save writes a step into a hidden folder (DCP shards, ``state.json``). Each rank hashes and flushes
what it wrote. Rank 0 gathers the hashes in ``manifest.json`` and renames the folder. Only then does
``latest`` name it, and older checkpoints are deleted. Loading checks every hash and falls back to
the newest whole checkpoint.
"""

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ...errors import CheckpointError
from ...parallel.mesh import Mesh
from .dcp_reader import HonestWriter, SafeFileSystemReader
from .files import Written, hashes_of, verify, write_manifest, write_state
from .folder import StepsFolder, step_of
from .parts import HostCopies, Part, Parts, open_ranks
from .problems import as_checkpoint_error, quiet_about_one_process, reason
from .writer import Writer

log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of a run, which all ranks write and read together."""

    def __init__(self, run_dir: Path, mesh: Mesh, keep: int) -> None:
        self._folder = StepsFolder(run_dir, keep)
        self._mesh = mesh
        self._ranks = open_ranks(mesh)
        self._parts = Parts(self._ranks)
        self._copies = HostCopies()
        self._writer = Writer(mesh.watch)

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Write a checkpoint of ``step``; all ranks call this with the tensors they own.

        If it cannot be written, raises :class:`CheckpointError` on all ranks and leaves no files
        of it behind.
        """
        part, planner = self._part(step, tensors)
        self._writer.start(lambda: self._write(step, part, planner, state))
        self._writer.wait()

    def start(
        self,
        step: int,
        tensors: dict[str, Tensor],
        state: dict[str, Any],
        failed: Callable[[BaseException], None],
    ) -> None:
        """Copy the tensors, and write the copies while the caller goes on.

        An error is passed to ``failed`` in another thread, and raised by the :meth:`wait` that all
        ranks must call before the next save.
        """
        part, planner = self._part(step, tensors)
        self._copies.take(part.plan, planner)
        self._writer.start(lambda: self._write(step, part, self._copies, state), failed)

    def wait(self) -> None:
        """Wait for what :meth:`start` began, if anything; raises its error as :meth:`save` does."""
        self._writer.wait()

    def newest_whole(self) -> Path | None:
        """Return the newest checkpoint that passes verification, the same on every rank.

        Warns of each checkpoint that it skips, naming the file. Raises :class:`CheckpointError` if
        there are checkpoints but none is whole.
        """
        names = self._mesh.on_rank_0(lambda: [step.name for step in self._folder.steps()])
        for name in names:
            problem = self._problem_with(self._folder.path / name)
            if problem is None:
                return self._folder.path / name
            if self._mesh.rank == 0:
                log.warning("skipping checkpoint %s: %s", name, problem)
        if not names:
            return None
        raise CheckpointError(
            f"none of the {len(names)} checkpoints in {self._folder.path} is whole; "
            "restore one from a backup or remove the folder to start anew."
        )

    def oldest_step(self) -> int:
        """Return the oldest step that a restart may continue from."""
        return min(map(step_of, self._folder.steps()), default=0)

    def load(self, path: Path, tensors: dict[str, Tensor]) -> None:
        """Fill ``tensors`` in place from a verified checkpoint, written by any number of ranks."""
        reader = SafeFileSystemReader(path)
        stored = reader.read_metadata().state_dict_metadata
        missing = sorted(key for key in tensors if key not in stored)
        if missing:
            raise CheckpointError(
                f"checkpoint {path} has no {missing[0]!r}, so it belongs to another model; "
                "use the run's own configuration or a new run_dir."
            )
        try:
            with quiet_about_one_process():
                dcp.load(tensors, storage_reader=reader, no_dist=self._mesh.dp_group is None)
        except dcp.api.CheckpointException as error:  # the hashes match, but the contents are bad
            raise CheckpointError(
                f"checkpoint {path} cannot be read ({reason(error)}); restore it from a backup."
            ) from error

    def _part(self, step: int, tensors: dict[str, Tensor]) -> tuple[Part, DefaultSavePlanner]:
        assert self._writer.is_free, "its copies and its group are in use; call wait() first"
        with as_checkpoint_error(self._folder.of(step)):
            return self._parts.of(tensors)

    def _write(
        self,
        step: int,
        part: Part,
        values: DefaultSavePlanner | HostCopies,
        state: dict[str, Any],
    ) -> None:
        """Write a checkpoint with the other ranks, in the writing thread."""
        final = self._folder.of(step)
        temporary = final.with_name(f".tmp-{final.name}")
        writer = HonestWriter(temporary)

        def commit(written: list[Written]) -> None:
            with self._writer.in_files():
                assert part.metadata is not None
                writer.finish(part.metadata, [rank.results for rank in written])
                write_state(temporary, step, state)
                write_manifest(temporary, [rank.hashes for rank in written])
                self._folder.commit(temporary, final)

        try:
            with as_checkpoint_error(final):
                self._ranks.broadcast("prepare", lambda: self._prepare(temporary))
                self._ranks.all_reduce(
                    "write", lambda: self._write_part(writer, part, values), commit
                )
        except CheckpointError:  # free its space, which the next save may need
            if self._ranks.is_coordinator:
                shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _prepare(self, temporary: Path) -> None:
        with self._writer.in_files():
            self._folder.prepare(temporary)

    def _write_part(
        self, writer: HonestWriter, part: Part, values: DefaultSavePlanner | HostCopies
    ) -> Written:
        """Write, hash and flush this rank's files."""
        with self._writer.in_files():
            if isinstance(values, HostCopies):
                values.wait()
            results = writer.write_data(part.plan, values).value()
            files = Path(writer.path).glob(f"{part.plan.storage_data.prefix}*")
            return Written(results, hashes_of(files))

    def _problem_with(self, path: Path) -> str | None:
        """Return what is wrong with a checkpoint; each rank hashes its share of the files."""
        found = self._mesh.gather(verify(path, self._mesh.rank, self._mesh.world_size))
        return self._mesh.on_rank_0(lambda: next((p for p in found if p is not None), None))


class StoredTensors(Mapping[str, Tensor]):
    """Every tensor of a checkpoint, gathered from all ranks' shards; each is read on access.

    Raises :class:`CheckpointError` for a tensor that cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._reader = SafeFileSystemReader(path)
        self._entries = {
            key: entry
            for key, entry in self._reader.read_metadata().state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: object) -> bool:  # Mapping's own would read the tensor
        return key in self._entries

    def type_and_shape(self, key: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Return what reading ``key`` will give."""
        entry = self._entries[key]
        return entry.properties.dtype, tuple(entry.size)

    def __getitem__(self, key: str) -> Tensor:
        dtype, shape = self.type_and_shape(key)
        tensor = torch.empty(shape, dtype=dtype)
        # Flattening would scan all keys of the checkpoint each time, and ours are flat already.
        planner = DefaultLoadPlanner(flatten_state_dict=False)
        try:
            with quiet_about_one_process():
                dcp.load({key: tensor}, storage_reader=self._reader, planner=planner, no_dist=True)
        except (OSError, dcp.api.CheckpointException) as error:
            raise CheckpointError(
                f"{key} of checkpoint {self._path} could not be read ({reason(error)}); "
                "repair the disk or restore the checkpoint from a backup."
            ) from error
        return tensor
