"""Turn a run's newest checkpoint into a Hugging Face folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError, ConfigError
from ...moe.config.kinds import read_model
from ...moe.folders.families.table import FAMILIES
from ...moe.folders.hf_config import to_hf
from ...moe.folders.shards import TensorPlan
from ...moe.folders.two_of_four_format import METHOD as N_OF_M
from ...moe.folders.two_of_four_format import NAME as TWO_OF_FOUR
from ...moe.folders.write_weights import plan_weights
from ...moe.folders.writer import write_model_folder
from ...parallel.mesh import Mesh
from ..data.tokenizer import Tokenizer, open_tokenizer
from ..optimizers.sparse_experts import stored_pattern
from .checkpoint import Checkpoints, StoredTensors
from .files import read_state
from .weights import CheckpointWeights, open_frozen_weights


def export(run_dir: Path, target: Path) -> int:
    """Write ``target`` from the newest whole checkpoint of ``run_dir`` and return its step.

    A run that started from a folder is written in that folder's family, if the family can express
    the model. Low-rank updates are merged into their weights. Raises :class:`ConfigError` for LoRA
    experts, which cannot be.
    """
    return _export(newest(run_dir), run_dir, target)


def export_newest(run_dir: Path) -> Path:
    """Return ``RUN_DIR/exports/STEP`` of the newest whole checkpoint; write it if it is new."""
    checkpoint = newest(run_dir)
    target = run_dir / "exports" / checkpoint.name
    if not target.exists():
        _export(checkpoint, run_dir, target)
    return target


def newest(run_dir: Path) -> Path:
    """Return the newest whole checkpoint of a run."""
    if not run_dir.is_dir():
        raise CheckpointError(f"{run_dir} is not a folder; give the run_dir of a training run.")
    checkpoint = Checkpoints(run_dir, Mesh(), keep=1).newest_whole()
    if checkpoint is None:
        raise CheckpointError(f"{run_dir} has no checkpoint yet; train until it saves one.")
    return checkpoint


def _export(checkpoint: Path, run_dir: Path, target: Path) -> int:
    state = read_state(checkpoint)
    model = read_model(state["model"])
    tokenizer = _tokenizer(state, run_dir)
    origin = state.get("origin") or {}
    _check_can_merge(run_dir, origin, state.get("lora"))
    token_ids, generation = {}, {}
    if model.writes_text and tokenizer is not None:
        token_ids = _token_ids(tokenizer, origin)
        generation = {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.eos_id}
        generation |= model.generation_values()
    values = exported_values(state, token_ids)
    plans = exported_weights(state, StoredTensors(checkpoint))
    if origin:  # None if that folder has no such file; then its config.json has the ids
        generation = origin["generation"]
    texts = dict(state.get("files", {}))
    if state.get("chat_template") is not None:
        texts["chat_template.jinja"] = state["chat_template"]

    def save_files(folder: Path) -> None:
        if tokenizer is not None:
            tokenizer.save(folder)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")

    write_model_folder(target, values, plans, save_files, generation)
    return int(state["step"])


def _tokenizer(state: Mapping[str, Any], run_dir: Path) -> Tokenizer | None:
    """Return the tokenizer of a run on texts, and None for another run."""
    if state["tokenizer"] is None:
        return None
    tokenizer = open_tokenizer(state["tokenizer"])
    if tokenizer.sha256 != state["tokenizer_sha256"]:
        raise CheckpointError(
            f"tokenizer {state['tokenizer']!r} is not the one {run_dir} was trained with; "
            "put that one back."
        )
    return tokenizer


def exported_values(
    state: Mapping[str, Any], token_ids: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Return the ``config.json`` of the export of a run with this state."""
    model = read_model(state["model"])
    origin = state.get("origin") or {}
    dtype = str(_exported_dtype(state)).removeprefix("torch.")
    return to_hf(model, dtype, token_ids, origin.get("config"))


def exported_weights(state: Mapping[str, Any], stored: Mapping[str, Tensor]) -> list[TensorPlan]:
    """Return the tensors of the export of a run with this state, whose weights are ``stored``."""
    dtype, lora = _exported_dtype(state), state.get("lora")
    if lora is not None and lora["experts"]:
        raise ConfigError(
            f"the run has {lora['experts']} LoRA experts for each MLP, which cannot be merged into "
            "one weight; export it with --adapter."
        )
    scale = None if lora is None else lora["alpha"] / lora["rank"]
    model = read_model(state["model"])
    parts = ("gate", "up") if model.moe is None else model.moe.fc1_parts
    frozen, pattern = open_frozen_weights(state, dtype), stored_pattern(state)
    weights = CheckpointWeights(stored, scale, frozen, parts, pattern)
    family = FAMILIES[exported_values(state)["model_type"]]
    return plan_weights(model, family, weights, dtype, torch.float32)


def _exported_dtype(state: Mapping[str, Any]) -> torch.dtype:
    """Return the type of exported weights; fp64 runs, made for tests, export as fp32."""
    return torch.bfloat16 if state["precision"] == "bf16" else torch.float32


def _check_can_merge(run_dir: Path, origin: dict[str, Any], lora: dict[str, Any] | None) -> None:
    """Refuse updates of experts that would fill the zeros of 2:4 weights."""
    stored = origin.get("config", {}).get("quantization_config") or {}
    if stored.get("quant_method") == N_OF_M and lora is not None and "experts" in lora["targets"]:
        raise CheckpointError(
            f"{run_dir} has low-rank updates of {TWO_OF_FOUR} experts, and merged they would not "
            f"be {TWO_OF_FOUR}; export with --adapter, and serve that on {origin['folder']}."
        )


def _token_ids(tokenizer: Tokenizer, origin: dict[str, Any]) -> dict[str, Any]:
    """Return the special ids to write; none if the ``start_from`` folder's config has them."""
    known = origin.get("config", {})
    if known.get("eos_token_id") is not None:
        return {}
    return {
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.eos_id,
        "bos_token_id": None,
    }
