"""Checkpoints that are whole or absent, and independent of the number of ranks.

A save writes a step into a hidden folder (DCP shards, ``state.json``), hashes the files into
``manifest.json``, flushes them to disk and renames the folder. Only then does ``latest`` name it,
and older checkpoints are deleted. Loading checks every hash and falls back to the newest whole
checkpoint.
"""

import logging
import re
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ...errors import CheckpointError
from ...files import sync
from ...parallel.mesh import Mesh
from ...parallel.watch.lost_rank import last_line
from .dcp_reader import HonestWriter, SafeFileSystemReader
from .files import verify, write_manifest, write_state

log = logging.getLogger(__name__)


class Checkpoints:
    """The ``checkpoints`` folder of a run."""

    def __init__(self, run_dir: Path, mesh: Mesh, keep: int) -> None:
        self._run_dir = run_dir
        self._folder = run_dir / "checkpoints"
        self._mesh = mesh
        self._keep = keep

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Write a checkpoint of ``step``; all ranks call this with the tensors they own.

        If it cannot be written, raises :class:`CheckpointError` on all ranks and leaves no files
        of it behind.
        """
        final = self._folder / f"step-{step:08d}"
        temporary = self._folder / f".tmp-{final.name}"
        try:
            self._mesh.on_rank_0(lambda: self._prepare(final, temporary))
            with _as_checkpoint_error(final), _quiet_about_one_process():
                writer = HonestWriter(temporary)
                dcp.save(tensors, storage_writer=writer, no_dist=self._mesh.dp_group is None)
            self._mesh.on_rank_0(lambda: self._commit(final, temporary, state))
        except CheckpointError:  # free its space, which the next save may need
            self._mesh.on_rank_0(lambda: shutil.rmtree(temporary, ignore_errors=True))
            raise

    def _prepare(self, final: Path, temporary: Path) -> None:
        with _as_checkpoint_error(final):
            self._folder.mkdir(parents=True, exist_ok=True)
            for leftover in self._folder.glob(".tmp-*"):
                shutil.rmtree(leftover)
            temporary.mkdir()

    def _commit(self, final: Path, temporary: Path, state: dict[str, Any]) -> None:
        """Hash, flush and rename; set damaged checkpoints aside and keep the ``keep`` newest.

        Everything that needs disk space comes before the rename, so that ``latest`` stays correct.
        """
        with _as_checkpoint_error(final):
            write_state(temporary, _step_of(final), state)
            write_manifest(temporary)
            latest = self._run_dir / ".latest.tmp"
            latest.write_text(final.name + "\n", encoding="utf-8")
            sync(latest)
            for damaged in self._steps():
                if damaged >= final:  # newer, so it failed verification when this run resumed
                    damaged.rename(damaged.with_name(f"damaged-{damaged.name}-{time.time_ns()}"))
            temporary.rename(final)
            sync(self._folder)
            latest.replace(self._run_dir / "latest")
            sync(self._run_dir)
            for old in self._steps()[self._keep :]:
                shutil.rmtree(old)

    def newest_whole(self) -> Path | None:
        """Return the newest checkpoint that passes verification, the same on every rank.

        Warns of each checkpoint that it skips, naming the file. Raises :class:`CheckpointError` if
        there are checkpoints but none is whole.
        """

        def choose() -> str | None:
            steps = self._steps()
            for step in steps:
                problem = verify(step)
                if problem is None:
                    return step.name
                log.warning("skipping checkpoint %s: %s", step.name, problem)
            if not steps:
                return None
            raise CheckpointError(
                f"none of the {len(steps)} checkpoints in {self._folder} is whole; "
                "restore one from a backup or remove the folder to start anew."
            )

        name = self._mesh.on_rank_0(choose)
        return None if name is None else self._folder / name

    def oldest_step(self) -> int:
        """Return the oldest step that a restart may continue from."""
        return min(map(_step_of, self._steps()), default=0)

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
            with _quiet_about_one_process():
                dcp.load(tensors, storage_reader=reader, no_dist=self._mesh.dp_group is None)
        except dcp.api.CheckpointException as error:  # the hashes match, but the contents are bad
            raise CheckpointError(
                f"checkpoint {path} cannot be read ({_reason(error)}); restore it from a backup."
            ) from error

    def _steps(self) -> list[Path]:
        if not self._folder.is_dir():
            return []
        return sorted(filter(_is_step, self._folder.iterdir()), reverse=True)


def _is_step(path: Path) -> bool:
    return re.fullmatch(r"step-\d{8}", path.name) is not None


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


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
            with _quiet_about_one_process():
                dcp.load({key: tensor}, storage_reader=self._reader, planner=planner, no_dist=True)
        except (OSError, dcp.api.CheckpointException) as error:
            raise CheckpointError(
                f"{key} of checkpoint {self._path} could not be read ({_reason(error)}); "
                "repair the disk or restore the checkpoint from a backup."
            ) from error
        return tensor


@contextmanager
def _as_checkpoint_error(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, dcp.api.CheckpointException) as error:
        raise CheckpointError(
            f"checkpoint {path} could not be written ({_reason(error)}), but the previous one is "
            "untouched; free space or repair the disk."
        ) from error


def _reason(error: OSError | dcp.api.CheckpointException) -> str:
    """Return the disk's error message, or the last line of another error.

    Raises what is not an error, such as Ctrl-C.
    """
    causes: list[BaseException] = [error]
    if isinstance(error, dcp.api.CheckpointException):
        causes = [failure[0] for failure in error.failures.values()]
    for cause in causes:
        if not isinstance(cause, Exception):
            raise cause from None
    for cause in causes:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror.lower()
    return last_line(causes[0])


@contextmanager
def _quiet_about_one_process() -> Iterator[None]:
    """DCP warns when it runs without a process group, which is what we want there."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
