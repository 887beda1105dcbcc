"""A small model folder with sharp routers and a byte tokenizer, for serving tests."""

from pathlib import Path

import torch

from moeyard.moe.config.model import ModelConfig
from moeyard.moe.config.moe import MoEConfig
from moeyard.moe.folders.families.table import FAMILIES
from moeyard.moe.folders.folder import ModelFolder
from moeyard.moe.folders.hf_config import to_hf
from moeyard.moe.folders.write_weights import plan_weights
from moeyard.moe.folders.writer import write_model_folder
from moeyard.moe.models.decoder import Decoder
from moeyard.moe.models.initialize import initialize
from moeyard.moe.routers.hash import Hash
from moeyard.moe.routers.topk import TopK
from moeyard.serving.experts.opening import open_store
from moeyard.serving.experts.store import ExpertStore
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
    for name, parameter in model.named_parameters():
        if "lm_head" in name or "embed" in name:
            parameter.data *= 20
    write_decoder(folder, model, eos_id=256)


def write_decoder(folder: Path, model: Decoder, eos_id: int) -> None:
    """Write a decoder that is in memory, with a byte tokenizer."""
    ids = {"eos_token_id": eos_id}
    values = to_hf(model.config, "float32", ids)
    family, weights = FAMILIES[values["model_type"]], DecoderWeights(model)
    plans = plan_weights(model.config, family, weights, torch.float32, torch.float32)
    write_model_folder(folder, values, plans, ByteTokenizer().save, ids)


class DecoderWeights:
    """The weights of a decoder that is in memory."""

    def __init__(self, model: Decoder) -> None:
        self._tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self._experts = dict(model.moe_layers())

    def dense(self, parameter: str) -> torch.Tensor:
        return self._tensors[parameter].detach()

    def expert_part(self, layer: int, expert: int, part: str) -> torch.Tensor:
        return self._experts[layer].experts.slot_views()[expert][part]


def slots(count: int, dtype: str = "float32") -> str:
    """Return the budget of ``count`` experts."""
    return f"{count * SLOT_ELEMENTS * (4 if dtype == 'float32' else 2)}B"


def small_store(folder: Path, count: int, **options: int) -> ExpertStore:
    """Open a store of ``count`` slots."""
    return open_store(ModelFolder(folder), torch.float32, count * SLOT_ELEMENTS * 4, **options)


def visit(store: ExpertStore, layer: int, *experts: int) -> list[int]:
    """Stream experts and return them in the order they came."""
    return [e for ready, _ in store.stream(layer, dict.fromkeys(experts, 1)) for e in ready]
