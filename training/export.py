"""Turn a run's newest checkpoint into a Hugging Face folder."""

from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..moe.config import ModelConfig
from ..moe.hf_config import to_hf
from ..moe.model_writer import TensorPlan, write_model_folder
from ..moe.tensor_names import expert_tensor_name, tensor_name
from ..parallel.mesh import Mesh
from .checkpoint import Checkpoints, StoredTensors, read_state
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
    eos = tokenizer.eos_id
    write_model_folder(
        target,
        to_hf(model, str(dtype).removeprefix("torch."), eos),
        plans_of(StoredTensors(checkpoint), dtype),
        tokenizer.save,
        {"eos_token_id": eos, "pad_token_id": eos},
    )
    return int(state["step"])


def plans_of(stored: StoredTensors, dtype: torch.dtype) -> list[TensorPlan]:
    """Return the tensors of the exported folder: weights, then buffers, in the order of keys."""
    keys = sorted(key for key in stored if key.startswith("weight/"))
    keys += sorted(key for key in stored if key.startswith("buffer/"))
    read = lru_cache(maxsize=1)(stored.__getitem__)  # fc1 is read once for its gate and its up
    return [plan for key in keys for plan in _plans_of_one(stored, read, key, dtype)]


def _plans_of_one(
    stored: StoredTensors, read: Callable[[str], Tensor], key: str, dtype: torch.dtype
) -> Iterator[TensorPlan]:
    stored_type, shape = stored.type_and_shape(key)
    name = key.partition("/")[2]
    path = name.split(".")
    is_router = ".mlp.gate." in name
    if not stored_type.is_floating_point or (is_router and dtype == torch.bfloat16):
        dtype = stored_type

    if "experts" not in path:
        yield TensorPlan(tensor_name(name), dtype, shape, lambda: [read(key).to(dtype)])
        return
    layer, expert, leaf = int(path[1]), int(path[4]), path[5]
    parts = ("gate", "up") if leaf == "fc1" else ("down",)
    shape = (shape[0] // len(parts), *shape[1:])
    for index, part in enumerate(parts):

        def rows(index: int = index) -> list[Tensor]:
            return [read(key).chunk(len(parts))[index].to(dtype)]

        yield TensorPlan(expert_tensor_name(layer, expert, part), dtype, shape, rows)
