"""Random adapter folders of LoRA experts."""

from pathlib import Path

import torch

from moeyard.moe.config.model import ModelConfig
from moeyard.moe.folders.lora_experts import LoraExpertsConfig, write_lora_experts

DENSE = ModelConfig(
    vocab_size=257,
    d_model=24,
    num_layers=3,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    max_positions=256,
    d_ff=20,
)
"""The model of small_model.py without experts."""


def random_tensors(config: ModelConfig, lora: LoraExpertsConfig, seed: int = 0) -> dict:
    """Return the factors and routers of every layer, and factors of attention."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    found = {}
    for layer in range(config.num_layers):
        for name, shape in lora.mlp_shapes(config.d_model, config.d_ff).items():
            found[f"model.layers.{layer}.mlp.{name}"] = draw(*shape)
        path = f"model.layers.{layer}.self_attn.q_proj.lora_"
        found[f"{path}A"] = draw(lora.rank, config.d_model) * config.d_model**-0.5
        found[f"{path}B"] = draw(config.num_heads * config.head_width, lora.rank)
    return found


def write_random(
    folder: Path,
    config: ModelConfig = DENSE,
    *,
    rank: int = 3,
    experts: int = 3,
    weighting: str = "none",
    seed: int = 0,
    **changes: object,
) -> Path:
    """Write a folder; ``changes`` replace tensors by name, None leaves one out."""
    lora = LoraExpertsConfig(rank=rank, alpha=6.0, experts=experts, weighting=weighting)
    tensors = random_tensors(config, lora, seed) | changes
    write_lora_experts(folder, lora, {n: t for n, t in tensors.items() if t is not None})
    return folder
