"""Checkpoints that are whole or absent, and independent of the number of ranks.

A step is written into a hidden folder (DCP shards, ``state.json``), hashed into
``manifest.json``, flushed to disk and renamed; only then does ``latest`` name it and do older
ones go. Loading checks every hash and falls back to the newest checkpoint that is whole.
"""

import hashlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ..errors import CheckpointError
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
        if self._mesh.rank == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            for leftover in self._folder.glob(".tmp-*"):
                shutil.rmtree(leftover)
            temporary.mkdir()
        self._mesh.barrier()
        try:
            with _quiet_about_one_process():
                dcp.save(tensors, checkpoint_id=temporary, no_dist=self._mesh.dp_group is None)
        except (OSError, dcp.api.CheckpointException) as error:
            reason = str(error).strip().splitlines()[-1]
            raise CheckpointError(
                f"checkpoint {final} could not be written ({reason}); "
                "the previous one is untouched. Free space or mend the disk and start again."
            ) from error
        if self._mesh.rank == 0:
            (temporary / STATE).write_text(json.dumps({"version": VERSION, "step": step, **state}))
            _write_manifest(temporary)
            if final.exists():
                shutil.rmtree(final)  # it did not pass verification, or the run would not be here
            temporary.rename(final)
            _sync_folder(self._folder)
            _replace_text(self._run_dir / "latest", final.name + "\n")
            for old in self._steps()[self._keep :]:
                shutil.rmtree(old)
        self._mesh.barrier()

    def newest_whole(self) -> Path | None:
        """Return the newest checkpoint that passes verification, the same on every rank.

        Says which file is wrong in those it passes over; raises :class:`CheckpointError` when
        there are checkpoints but none is whole.
        """
        chosen = torch.full((), -1, dtype=torch.int64)
        steps = self._steps()
        if self._mesh.rank == 0:
            for index, step in enumerate(steps):
                problem = verify(step)
                if problem is None:
                    chosen.fill_(index)
                    break
                log.warning("skipping checkpoint %s: %s", step.name, problem)
        else:
            chosen.zero_()
        index = int(self._mesh.sum(chosen))
        if index >= 0:
            return steps[index]
        if steps:
            raise CheckpointError(
                f"none of the {len(steps)} checkpoints in {self._folder} is whole; "
                "restore one from a backup or remove the folder to start anew."
            )
        return None

    def load(self, path: Path, tensors: dict[str, Tensor]) -> None:
        """Fill ``tensors`` in place from a verified checkpoint, whatever ranks wrote it."""
        reader = SafeFileSystemReader(path)
        stored = reader.read_metadata().state_dict_metadata
        missing = sorted(key for key in tensors if key not in stored)
        if missing:
            raise CheckpointError(
                f"checkpoint {path} has no {missing[0]!r}; it belongs to another model. "
                "Use the run's own configuration or a new run_dir."
            )
        with _quiet_about_one_process():
            dcp.load(tensors, storage_reader=reader, no_dist=self._mesh.dp_group is None)

    def _steps(self) -> list[Path]:
        return sorted(self._folder.glob("step-*"), reverse=True)


def read_state(path: Path) -> dict[str, Any]:
    """Return what ``save`` was given as ``state``, with ``step``."""
    state: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf-8"))
    if state["version"] != VERSION:
        raise CheckpointError(
            f"checkpoint {path} has format {state['version']}; this release reads {VERSION}."
        )
    return state


def read_tensors(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """Read every tensor whose key starts with ``prefix``, gathered from all ranks' shards."""
    reader = SafeFileSystemReader(path)
    stored = reader.read_metadata().state_dict_metadata
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in stored.items()
        if key.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    with _quiet_about_one_process():
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def verify(path: Path) -> str | None:
    """Return what is wrong with a checkpoint folder, or None."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files: dict[str, dict[str, Any]] = manifest["files"]
    except (OSError, ValueError, KeyError):
        return f"{MANIFEST} is missing or unreadable"
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, the manifest says {expected['bytes']}"
        if _sha256(file) != expected["sha256"]:
            return f"{name} does not match its hash"
    return None


@contextmanager
def _quiet_about_one_process() -> Iterator[None]:
    """DCP warns when it runs without a process group, which is what we want there."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _write_manifest(folder: Path) -> None:
    files = {}
    for file in sorted(folder.iterdir()):
        files[file.name] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        _sync_file(file)
    _replace_text(folder / MANIFEST, json.dumps({"version": VERSION, "files": files}, indent=1))
    _sync_folder(folder)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _replace_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    _sync_file(temporary)
    temporary.replace(path)
    _sync_folder(path.parent)


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_sync_folder = _sync_file
