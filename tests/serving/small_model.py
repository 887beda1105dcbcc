"""A small model folder with sharp routers and a byte tokenizer, for serving tests."""

from pathlib import Path

import torch

from moeyard.moe.config import ModelConfig, MoEConfig
from moeyard.moe.decoder import Decoder
from moeyard.moe.hf_config import to_hf
from moeyard.moe.initialize import initialize
from moeyard.moe.model_folder import ModelFolder
from moeyard.moe.model_writer import TensorPlan, write_model_folder
from moeyard.moe.router_config import Hash, TopK
from moeyard.moe.tensor_names import expert_tensor_name, tensor_name
from moeyard.serving.store import ExpertStore
from moeyard.training.data.tokenizer import ByteTokenizer

CONFIG = ModelConfig(
    vocab_size=257,
    d_model=24,
    num_layers=3,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    max_positions=256,
    d_ff=20,
    dense_layers=(1,),
    moe=MoEConfig(num_experts=6, d_expert=20, router=TopK(k=2)),
)
"""Ragged on purpose: expert sizes are no multiples of anything."""
SLOT_ELEMENTS = 3 * 20 * 24
NUM_EXPERTS = 2 * 6


def with_router(router: TopK | Hash) -> ModelConfig:
    """Return the configuration with another router."""
    moe = CONFIG.moe.model_copy(update={"router": router})
    return CONFIG.model_copy(update={"moe": moe})


def write_random_model(folder: Path, config: ModelConfig = CONFIG) -> None:
    """Write the folder; scaled embeddings and head make its scores sharp."""
    model = Decoder(config)
    initialize(model, 5)
    tensors = {tensor_name(name): buffer for name, buffer in model.named_buffers()}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if "experts" not in parts:
            scale = 20 if "lm_head" in name or "embed" in name else 1
            tensors[tensor_name(name)] = parameter.data * scale
            continue
        for expert, matrix in enumerate(parameter.data):
            halves = matrix.chunk(2) if parts[-1] == "fc1" else (matrix,)
            names = ("gate", "up") if parts[-1] == "fc1" else ("down",)
            for part, half in zip(names, halves, strict=True):
                tensors[expert_tensor_name(int(parts[1]), expert, part)] = half
    values = to_hf(config, "float32", 256)
    plans = [plan_of(name, tensor) for name, tensor in tensors.items()]
    write_model_folder(folder, values, plans, ByteTokenizer().save, {"eos_token_id": 256})


def plan_of(name: str, tensor: torch.Tensor) -> TensorPlan:
    """Plan a tensor that is in memory."""
    return TensorPlan(name, tensor.dtype, tuple(tensor.shape), lambda: [tensor])


def slots(count: int, dtype: str = "float32") -> str:
    """Return the budget of ``count`` experts."""
    return f"{count * SLOT_ELEMENTS * (4 if dtype == 'float32' else 2)}B"


def small_store(folder: Path, count: int, **options: int) -> ExpertStore:
    """Open a store of ``count`` slots."""
    return ExpertStore(ModelFolder(folder), torch.float32, count * SLOT_ELEMENTS * 4, **options)


def visit(store: ExpertStore, layer: int, *experts: int) -> list[int]:
    """Stream experts and return them in the order they came."""
    return [expert for ready, _ in store.stream(layer, experts) for expert in ready]
