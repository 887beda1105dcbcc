"""Turn a run's newest checkpoint into a Hugging Face folder."""

from pathlib import Path
from typing import Any

import torch

from ...errors import CheckpointError
from ...moe.config.kinds import read_model
from ...moe.folders.families.table import FAMILIES
from ...moe.folders.hf_config import to_hf
from ...moe.folders.write_weights import plan_weights
from ...moe.folders.writer import write_model_folder
from ...parallel.mesh import Mesh
from ..data.tokenizer import Tokenizer, open_tokenizer
from .checkpoint import Checkpoints, StoredTensors
from .files import read_state
from .weights import CheckpointWeights, open_frozen_weights


def export(run_dir: Path, target: Path) -> int:
    """Write ``target`` from the newest whole checkpoint of ``run_dir`` and return its step.

    A run that started from a folder is written in that folder's family, if the family can express
    the model. Low-rank updates are merged into their weights.
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
    tokenizer = open_tokenizer(state["tokenizer"])
    if tokenizer.sha256 != state["tokenizer_sha256"]:
        raise CheckpointError(
            f"tokenizer {state['tokenizer']!r} is not the one {run_dir} was trained with; "
            "put that one back."
        )
    # fp64 runs, made for tests of exactness, export as fp32.
    dtype = torch.bfloat16 if state["precision"] == "bf16" else torch.float32
    origin = state.get("origin") or {}
    values = to_hf(
        model,
        str(dtype).removeprefix("torch."),
        _token_ids(tokenizer, origin) if model.generates else {},
        origin.get("config"),
    )
    lora = state.get("lora")
    scale = None if lora is None else lora["alpha"] / lora["rank"]
    frozen = open_frozen_weights(state, dtype)
    weights = CheckpointWeights(StoredTensors(checkpoint), scale, frozen)
    plans = plan_weights(model, FAMILIES[values["model_type"]], weights, dtype, torch.float32)
    generation = {}
    if model.generates:
        generation = {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.eos_id}
    if origin:  # None if that folder has no such file; then its config.json has the ids
        generation = origin["generation"]

    def save_tokenizer(folder: Path) -> None:
        tokenizer.save(folder)
        if state.get("chat_template") is not None:
            (folder / "chat_template.jinja").write_text(state["chat_template"], encoding="utf-8")

    write_model_folder(target, values, plans, save_tokenizer, generation)
    return int(state["step"])


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
