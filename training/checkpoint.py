"""Checkpoints that are whole or absent, and independent of the number of ranks.

A step is written into a hidden folder (DCP shards, ``state.json``), hashed into
``manifest.json``, flushed to disk and renamed; only then does ``latest`` name it and do older
ones go. Loading checks every hash and falls back to the newest checkpoint that is whole.
"""

import json
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

from ..errors import CheckpointError
from ..files import replace_text, sha256_of, sync
from ..parallel.mesh import Mesh
from .dcp_reader import SafeFileSystemReader

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STATE = "state.json"
VERSION = 1


class Checkpoints:
    """The ``checkpoints`` folder of a run."""

    def __init__(self, run_dir: Path, mesh: Mesh, keep: int) -> None:
        self._run_dir = run_dir
        self._folder = run_dir / "checkpoints"
        self._mesh = mesh
        self._keep = keep

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Write a checkpoint of ``step``; all ranks call this with the tensors they own."""
        final = self._folder / f"step-{step:08d}"
        temporary = self._folder / f".tmp-{final.name}"
        self._mesh.on_rank_0(lambda: self._prepare(final, temporary))
        with _as_checkpoint_error(final), _quiet_about_one_process():
            dcp.save(tensors, checkpoint_id=temporary, no_dist=self._mesh.dp_group is None)
        facts = {"version": VERSION, "step": step, **state}
        self._mesh.on_rank_0(lambda: self._commit(final, temporary, facts))

    def _prepare(self, final: Path, temporary: Path) -> None:
        with _as_checkpoint_error(final):
            self._folder.mkdir(parents=True, exist_ok=True)
            for leftover in self._folder.glob(".tmp-*"):
                shutil.rmtree(leftover)
            temporary.mkdir()

    def _commit(self, final: Path, temporary: Path, facts: dict[str, Any]) -> None:
        """Hash, flush and rename; then let go of what is older than ``keep`` or was damaged."""
        with _as_checkpoint_error(final):
            (temporary / STATE).write_text(json.dumps(facts), encoding="utf-8")
            _write_manifest(temporary)
            for damaged in self._steps():
                if damaged >= final:  # newer, so it failed verification when this run resumed
                    damaged.rename(damaged.with_name(f"damaged-{damaged.name}-{time.time_ns()}"))
            temporary.rename(final)
            sync(self._folder)
            replace_text(self._run_dir / "latest", final.name + "\n")
            for old in self._steps()[self._keep :]:
                shutil.rmtree(old)

    def newest_whole(self) -> Path | None:
        """Return the newest checkpoint that passes verification, the same on every rank.

        Says which file is wrong in those it passes over; raises :class:`CheckpointError` when
        there are checkpoints but none is whole.
        """
        steps = self._steps()
        chosen = torch.tensor(-1 if self._mesh.rank == 0 else 0)

        def choose() -> None:
            for index, step in enumerate(steps):
                problem = verify(step)
                if problem is None:
                    chosen.fill_(index)
                    return
                log.warning("skipping checkpoint %s: %s", step.name, problem)

        self._mesh.on_rank_0(choose)
        index = int(self._mesh.sum(chosen))
        if index >= 0:
            return steps[index]
        if steps:
            raise CheckpointError(
                f"none of the {len(steps)} checkpoints in {self._folder} is whole; "
                "restore one from a backup or remove the folder to start anew."
            )
        return None

    def oldest_step(self) -> int:
        """Return the oldest step that a restart may go on from."""
        return min((int(path.name.removeprefix("step-")) for path in self._steps()), default=0)

    def load(self, path: Path, tensors: dict[str, Tensor]) -> None:
        """Fill ``tensors`` in place from a verified checkpoint, whatever ranks wrote it."""
        reader = SafeFileSystemReader(path)
        stored = reader.read_metadata().state_dict_metadata
        missing = sorted(key for key in tensors if key not in stored)
        if missing:
            raise CheckpointError(
                f"checkpoint {path} has no {missing[0]!r}, so it belongs to another model; "
                "use the run's own configuration or a new run_dir."
            )
        with _quiet_about_one_process():
            dcp.load(tensors, storage_reader=reader, no_dist=self._mesh.dp_group is None)

    def _steps(self) -> list[Path]:
        if not self._folder.is_dir():
            return []
        return sorted(filter(_is_step, self._folder.iterdir()), reverse=True)


def _is_step(path: Path) -> bool:
    return re.fullmatch(r"step-\d{8}", path.name) is not None


def read_state(path: Path) -> dict[str, Any]:
    """Return what ``save`` was given as ``state``, with ``step``."""
    state: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf-8"))
    if state["version"] != VERSION:
        raise CheckpointError(
            f"checkpoint {path} has format {state['version']}; this release reads {VERSION}."
        )
    return state


class StoredTensors(Mapping[str, Tensor]):
    """Every tensor of a checkpoint, gathered from all ranks' shards; read when it is asked for.

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
        # Flattening would look at all keys of the checkpoint each time, and ours are flat.
        planner = DefaultLoadPlanner(flatten_state_dict=False)
        try:
            with _quiet_about_one_process():
                dcp.load({key: tensor}, storage_reader=self._reader, planner=planner, no_dist=True)
        except (OSError, dcp.api.CheckpointException) as error:
            raise CheckpointError(
                f"{key} of checkpoint {self._path} could not be read ({_reason(error)}); "
                "mend the disk or restore the checkpoint from a backup."
            ) from error
        return tensor


def verify(path: Path) -> str | None:
    """Return what is wrong with a checkpoint folder, or None."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files = {n: (f["bytes"], f["sha256"]) for n, f in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is missing or unreadable"
    for name, (num_bytes, digest) in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != num_bytes:
            return f"{name} has {file.stat().st_size} bytes, the manifest says {num_bytes}"
        if sha256_of(file) != digest:
            return f"{name} does not match its hash"
    missing = {STATE, ".metadata"} - files.keys()
    return f"{MANIFEST} does not list {missing.pop()}" if missing else None


@contextmanager
def _as_checkpoint_error(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, dcp.api.CheckpointException) as error:
        raise CheckpointError(
            f"checkpoint {path} could not be written ({_reason(error)}), but the previous one is "
            "untouched; free space or mend the disk and start again."
        ) from error


def _reason(error: OSError | dcp.api.CheckpointException) -> str:
    """Return the last line of an error; raises what is no fault of the disk, such as Ctrl-C."""
    if isinstance(error, dcp.api.CheckpointException):
        for failure in error.failures.values():
            if not isinstance(failure[0], Exception):
                raise failure[0] from None
    return str(error).strip().splitlines()[-1]


@contextmanager
def _quiet_about_one_process() -> Iterator[None]:
    """DCP warns when it runs without a process group, which is what we want there."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _write_manifest(folder: Path) -> None:
    files = {}
    for file in sorted(folder.iterdir()):
        files[file.name] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
        sync(file)
    replace_text(folder / MANIFEST, json.dumps({"version": VERSION, "files": files}, indent=1))
    sync(folder)
