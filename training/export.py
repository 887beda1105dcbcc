"""Turn a run's newest checkpoint into a Hugging Face folder."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..moe.config import ModelConfig
from ..moe.hf_config import to_hf
from ..moe.model_writer import write_model_folder
from ..moe.tensor_names import expert_tensor_name, tensor_name
from ..parallel.mesh import Mesh
from .checkpoint import Checkpoints, read_state, read_tensors
from .data.tokenizer import open_tokenizer


def export(run_dir: Path, target: Path) -> int:
    """Write ``target`` from the newest whole checkpoint of ``run_dir`` and return its step."""
    if not run_dir.is_dir():
        raise CheckpointError(f"{run_dir} is no folder; give the run_dir of a training run.")
    checkpoint = Checkpoints(run_dir, Mesh(), keep=1).newest_whole()
    if checkpoint is None:
        raise CheckpointError(f"{run_dir} has no checkpoint yet; train until it saves one.")
    state = read_state(checkpoint)
    model = ModelConfig.model_validate(state["model"])
    tokenizer = open_tokenizer(state["tokenizer"])
    if tokenizer.sha256 != state["tokenizer_sha256"]:
        raise CheckpointError(
            f"tokenizer {state['tokenizer']!r} is not the one {run_dir} was trained with; "
            "put that one back."
        )
    # fp64 runs, made for tests of exactness, export as fp32.
    dtype = torch.bfloat16 if state["precision"] == "bf16" else torch.float32
    values = to_hf(model, str(dtype).removeprefix("torch."), tokenizer.eos_id)
    tensors = _named(read_tensors(checkpoint, "weight/"), read_tensors(checkpoint, "buffer/"))
    write_model_folder(target, values, _cast(tensors, dtype), tokenizer.save)
    return int(state["step"])


def _named(weights: dict[str, Tensor], buffers: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for key in sorted(weights):
        name = key.removeprefix("weight/")
        parts = name.split(".")
        if "experts" in parts:
            layer, expert, leaf = int(parts[1]), int(parts[4]), parts[5]
            if leaf == "fc1":
                gate, up = weights[key].chunk(2)
                yield expert_tensor_name(layer, expert, "gate"), gate
                yield expert_tensor_name(layer, expert, "up"), up
            else:
                yield expert_tensor_name(layer, expert, "down"), weights[key]
        else:
            yield tensor_name(name), weights[key]
    for key in sorted(buffers):
        yield tensor_name(key.removeprefix("buffer/")), buffers[key]


def _cast(
    tensors: Iterator[tuple[str, Tensor]], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        is_router = ".mlp.gate." in name
        if not tensor.is_floating_point() or (is_router and dtype == torch.bfloat16):
            yield name, tensor
        else:
            yield name, tensor.to(dtype)
