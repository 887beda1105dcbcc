"""The files of one checkpoint folder: write and verify them, and read ``state.json``."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch.distributed.checkpoint.storage import WriteResult

from ...errors import CheckpointError, ConfigError
from ...files import replace_text, sha256_of, sync
from ...moe.config.kinds import read_model
from ...moe.config.model import LayersConfig
from ..lora_config import LoraConfig
from .dcp_reader import METADATA, SafeFileSystemReader

MANIFEST = "manifest.json"
STATE = "state.json"
VERSION = 1

Hashes = dict[str, dict[str, Any]]
"""Size and SHA-256 of files by name, as in the manifest."""


@dataclass(frozen=True, slots=True)
class Written:
    """What a rank has written of a checkpoint."""

    results: list[WriteResult]
    """Where each tensor is."""
    hashes: Hashes


class _State(BaseModel):
    """What ``state.json`` must hold, so that later code need not check again."""

    model_config = ConfigDict(extra="allow", strict=True)

    step: int = Field(ge=0, le=99_999_999)
    world_size: int = Field(ge=1)
    seed: int
    model: dict[str, Any]
    train_shard_sha256: str
    batch_sequences: int
    sequence_length: int
    precision: str
    tokenizer: str | None
    tokenizer_sha256: str | None = None
    origin: dict[str, Any] | None = None
    lora: LoraConfig | None = None


def write_state(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Write ``state.json``."""
    facts = {"version": VERSION, "step": step, **state}
    (folder / STATE).write_text(json.dumps(facts), encoding="utf-8")


def read_state(path: Path) -> dict[str, Any]:
    """Return the ``state`` given to :func:`write_state`, plus ``step``."""
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        version = state["version"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        raise CheckpointError(
            f"{path / STATE} cannot be read; restore the checkpoint from a backup."
        ) from None
    if version != VERSION:
        raise CheckpointError(
            f"checkpoint {path} has format {version}, but this release reads {VERSION}; use the "
            "release that wrote it."
        )
    try:
        checked = _State.model_validate(state)
        read_model(state["model"])
    except ValidationError as error:
        problem = error.errors()[0]
        cause = problem.get("ctx", {}).get("error")
        if isinstance(cause, ConfigError):  # the user's own router, not permitted
            raise cause from None
        key = ".".join(map(str, problem["loc"]))
        raise CheckpointError(
            f"{path / STATE} says something impossible ({key or 'model'}: {problem['msg']}); "
            "restore the checkpoint from a backup."
        ) from None
    found: dict[str, Any] = state
    if checked.lora is not None:  # earlier releases had fewer keys
        found["lora"] = checked.lora.model_dump(mode="json")
    return found


def check_same_model(path: Path, stored: dict[str, Any], own: LayersConfig) -> None:
    """Raise :class:`CheckpointError` if a run's model is another than a checkpoint's."""
    before, now = ({"kind": m.kind} | m.architecture() for m in (read_model(stored), own))
    for key, actual in now.items():
        if before[key] != actual:
            raise CheckpointError(
                f"checkpoint {path} has model.{key} = {before[key]}, but the configuration says "
                f"{actual}; use the same model or a new run_dir."
            )


def hashes_of(files: Iterable[Path]) -> Hashes:
    """Hash files and flush them to disk."""
    found = {}
    for file in sorted(files):
        found[file.name] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
        sync(file)
    return found


def write_manifest(folder: Path, hashes: Iterable[Hashes]) -> None:
    """Write the hashes of every rank's files, and of the others; flush the folder.

    Raises :class:`CheckpointError` if a file is missing. A rank with another run folder writes its
    shard there, which no hash would show.
    """
    files: Hashes = {}
    for rank in hashes:
        files |= rank
    present = {file.name: file for file in folder.iterdir()}
    missing = sorted((SafeFileSystemReader(folder).file_names() | files.keys()) - present.keys())
    if missing:
        raise CheckpointError(
            f"checkpoint {folder} lacks {missing[0]}, which a rank wrote elsewhere; put run_dir on "
            "a file system that all hosts share."
        )
    files |= hashes_of(present[name] for name in present.keys() - files.keys())
    files = dict(sorted(files.items()))
    replace_text(folder / MANIFEST, json.dumps({"version": VERSION, "files": files}, indent=1))
    sync(folder)


def verify(path: Path, rank: int = 0, world_size: int = 1) -> str | None:
    """Return what is wrong with a checkpoint folder, or None.

    Rank ``rank`` of ``world_size`` hashes its share of the files.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files = {n: (f["bytes"], f["sha256"]) for n, f in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{MANIFEST} is missing or unreadable"
    for number, (name, (num_bytes, digest)) in enumerate(files.items()):
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != num_bytes:
            return f"{name} has {file.stat().st_size} bytes, the manifest says {num_bytes}"
        if number % world_size != rank:
            continue
        try:
            if sha256_of(file) != digest:
                return f"{name} does not match its hash"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    missing = {STATE, METADATA} - files.keys()
    if missing:
        return f"{MANIFEST} does not list {missing.pop()}"
    try:
        unlisted = SafeFileSystemReader(path).file_names() - files.keys()
    except CheckpointError as error:
        return str(error)
    return f"{MANIFEST} does not list {unlisted.pop()}" if unlisted else None
