"""Start a run from a Hugging Face folder: its model, its tokenizer, its weights."""

from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError, ModelFileError
from ..moe.config import ModelConfig
from ..moe.decoder import Decoder
from ..moe.layer import Experts
from ..moe.model_folder import ModelFolder
from ..moe.read_weights import read_experts, read_tensor

NEW_IN_TRAINING = "gate.e_score_correction_bias"
"""The one tensor that a run may have and its folder not: a balancing bias begins at 0."""


def complete_values(values: dict[str, Any]) -> dict[str, Any]:
    """Return a run's configuration with what ``start_from`` says under what the run says.

    ``model`` may hold what is to change (another look-ahead, other losses), or nothing.
    """
    start_from = values.get("start_from")
    if not isinstance(start_from, str):
        return values
    folder = ModelFolder(Path(start_from))
    folder.close()
    given = values.get("model") or {}
    if not isinstance(given, dict):
        return values  # validation says what is wrong with it
    data = values.get("data") or {}
    if isinstance(data, dict) and (folder.path / "tokenizer.json").is_file():
        data = {"tokenizer": start_from} | data
    model = _merged(folder.config.model_dump(mode="json"), given)
    return values | {"model": model, "data": data}


def check_start(folder: ModelFolder, model: ModelConfig) -> None:
    """Raise :class:`ConfigError` where the weights of ``folder`` do not fit the run's model."""
    try:
        folder.check(model, without=NEW_IN_TRAINING)
    except ModelFileError as error:
        raise ConfigError(
            f"model does not fit the weights of start_from = {str(folder.path)!r}: {error}"
        ) from None


def read_start(folder: ModelFolder, decoder: Decoder) -> None:
    """Fill this rank's part of a decoder: its experts and all else, and nothing twice."""
    with torch.no_grad():
        for index, layer in decoder.moe_layers():
            assert isinstance(layer.experts, Experts)
            read_experts(folder, layer.experts, index)
        for name, tensor in (*decoder.named_parameters(), *decoder.named_buffers()):
            if ".mlp.experts." in name or (name.endswith(NEW_IN_TRAINING) and name not in folder):
                continue
            read_tensor(folder, name, tensor.data)


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    found = dict(base)
    for key, value in over.items():
        below = found.get(key)
        if isinstance(value, dict) and isinstance(below, dict):
            # Another kind of thing shares no keys with the one that was there.
            is_same = value.get("kind", below.get("kind")) == below.get("kind")
            found[key] = _merged(below, value) if is_same else value
        else:
            found[key] = value
    return found
