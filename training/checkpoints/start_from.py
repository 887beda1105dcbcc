"""Start a run from a Hugging Face folder: its model, its tokenizer, its weights."""

import hashlib
import logging
import os
from collections.abc import Iterator, Set
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...errors import ConfigError, ModelFileError
from ...moe.experts.resident import Experts
from ...moe.experts.streamed import StreamedExperts
from ...moe.folders.folder import ModelFolder
from ...moe.folders.generation_config import generation_to_keep
from ...moe.folders.hub import local_folder, pinned
from ...moe.folders.read_weights import WeightRead, expert_reads, read_tensor, run_reads
from ...moe.models.initialize import initialize
from ...moe.models.model import Model

log = logging.getLogger(__name__)

MAY_BE_NEW = ("pooler.weight", "pooler.bias")
"""Parameters that a folder may lack: those of tasks without them. Then they begin as in a new run.
"""
AVERAGE = tuple(f".average.{part}" for part in ("fc1", "fc2", "fc1_bias", "fc2_bias"))
STATISTICS = ("gate.mean_ED", "gate.variance_ED")
NEW_IN_TRAINING = ("gate.e_score_correction_bias", *STATISTICS, *AVERAGE)
"""Tensors that a folder may lack: a balancing bias, which begins at 0, statistics and
the average of experts, which follow from their weights."""

IDENTITY_BYTES = 1 << 20
"""Bytes of each weight file that tell it from another one."""


def complete_values(values: dict[str, Any]) -> dict[str, Any]:
    """Return a run's configuration with defaults from the ``start_from`` folder.

    The run's own values win: ``model`` may change parts (another look-ahead, other losses) or be
    empty. Raises :class:`ConfigError` for a folder that cannot be used.
    """
    values = _with_pinned_tokenizer(values)
    start_from = values.get("start_from")
    if not isinstance(start_from, str):
        return values
    try:
        start_from = pinned(start_from)
        folder = ModelFolder(local_folder(start_from))
    except ModelFileError as error:
        raise ConfigError(f"start_from is {start_from!r}, which cannot be used: {error}") from None
    folder.close()
    given = values.get("model") or {}
    if not isinstance(given, dict):
        return values  # validation says what is wrong with it
    values = values | {"start_from": start_from}
    data = values.get("data") or {}
    is_on_texts = folder.config.reads_tokens and isinstance(data, dict)
    if is_on_texts and data.get("tokenizer") is None:
        data = data | {"tokenizer": start_from}
    kind = given.get("kind", folder.config.kind)
    if kind != folder.config.kind:
        raise ConfigError(
            f"model.kind is {kind!r}, but start_from {start_from!r} has weights of kind "
            f"{folder.config.kind}; leave model.kind out, or start from another folder."
        )
    model = _merged(folder.config.model_dump(mode="json"), given)
    return values | {"model": model, "data": data}


def _with_pinned_tokenizer(values: dict[str, Any]) -> dict[str, Any]:
    """Name the commit of a tokenizer on the hub, so that a resumed run takes the same one."""
    data = values.get("data")
    name = data.get("tokenizer") if isinstance(data, dict) else None
    if not isinstance(data, dict) or not isinstance(name, str) or name == "bytes":
        return values
    try:
        return values | {"data": data | {"tokenizer": pinned(name, weights=False)}}
    except ModelFileError as error:
        raise ConfigError(f"data.tokenizer is {name!r}, which cannot be used: {error}") from None


def read_origin(start_from: str) -> dict[str, Any]:
    """Return what tells the folder from others and what an export needs of it."""
    folder = ModelFolder(local_folder(start_from))
    folder.close()
    return {
        "folder": str(folder.path.resolve()),
        "weights": weights_identity(folder.path),
        "config": folder.values,
        "generation": generation_to_keep(folder),
    }


def weights_identity(folder: Path) -> str:
    """Return a hash of the names, the sizes and the first bytes of a folder's weight files.

    The first bytes name all tensors and have some weights. Hashing everything would read as much as
    training avoids to.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            digest.update(file.read(IDENTITY_BYTES))
    return digest.hexdigest()[:16]


def read_start(
    start_from: str, decoder: Model, ignore_unused_weights: bool = False, seed: int = 0
) -> None:
    """Fill this rank's part of a model, its experts and the rest, reading each tensor once.

    What the folder cannot give, such as a head for other labels, begins as a run of ``seed`` does.

    Raises :class:`ConfigError` if the folder's weights do not fit the run's model.
    """
    folder = ModelFolder(local_folder(start_from))
    try:
        of_other_task = decoder.config.fresh_tensors(folder.config)
        left_out = folder.check(
            decoder.config, (*NEW_IN_TRAINING, *MAY_BE_NEW), ignore_unused_weights, of_other_task
        )
        if left_out is not None and os.environ.get("RANK", "0") == "0":
            log.warning("%s", left_out)
        fresh = {*of_other_task, *(name for name in MAY_BE_NEW if name not in folder)}
        initialize(decoder, seed, fresh)
        with torch.no_grad():
            run_reads(folder, _reads(folder, decoder, fresh))
    except ModelFileError as error:
        raise ConfigError(f"start_from is {start_from!r}, which does not fit: {error}") from None
    finally:
        folder.close()


def _reads(folder: ModelFolder, decoder: Model, fresh: Set[str]) -> Iterator[WeightRead]:
    for index, layer in decoder.moe_layers():
        if isinstance(layer.experts, StreamedExperts):
            continue  # they stay in the folder
        assert isinstance(layer.experts, Experts)
        experts = zip(layer.experts.expert_ids, layer.experts.slot_views(), strict=True)
        yield from expert_reads(folder, index, experts)
    for name, tensor in (*decoder.named_parameters(), *decoder.named_buffers()):
        is_new = name.endswith(NEW_IN_TRAINING) and name not in folder
        if ".mlp.experts." not in name and not is_new and name not in fresh:
            yield tensor.nbytes, partial(read_tensor, folder, name, tensor.data)


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    found = dict(base)
    for key, value in over.items():
        below = found.get(key)
        if isinstance(value, dict) and isinstance(below, dict):
            # A section of another kind shares no keys with the old one.
            is_same = value.get("kind", below.get("kind")) == below.get("kind")
            found[key] = _merged(below, value) if is_same else value
        else:
            found[key] = value
    return found
