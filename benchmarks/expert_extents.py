"""Folders of random experts that are one extent each, or three."""

from dataclasses import replace
from pathlib import Path

import torch

from moeyard.moe.config.model import ModelConfig
from moeyard.moe.config.moe import MoEConfig
from moeyard.moe.folders.families.table import FAMILIES
from moeyard.moe.folders.hf_config import to_hf
from moeyard.moe.folders.tensor_names import dense_tensors
from moeyard.moe.folders.write_weights import plan_weights
from moeyard.moe.folders.writer import write_model_folder
from moeyard.moe.routers.topk import TopK


def config_of(d_model: int, d_expert: int, num_layers: int, num_experts: int) -> ModelConfig:
    """Return a model that is little more than its experts."""
    return ModelConfig(
        vocab_size=257,
        d_model=d_model,
        num_layers=num_layers,
        num_heads=2,
        num_kv_heads=1,
        head_dim=32,
        max_positions=64,
        moe=MoEConfig(num_experts=num_experts, d_expert=d_expert, router=TopK(k=2)),
    )


class RandomWeights:
    """Weights that no compression makes small."""

    def __init__(self, config: ModelConfig) -> None:
        moe = config.moe
        assert moe is not None
        self._shapes = {"down": (config.d_model, moe.d_expert)}
        self._wide = (moe.d_expert, config.d_model)
        self._config = config

    def dense(self, parameter: str) -> torch.Tensor:
        return torch.randn(dict(dense_tensors(self._config))[parameter].shape)

    def expert_part(self, layer: int, expert: int, part: str) -> torch.Tensor:
        return torch.randn(self._shapes.get(part, self._wide))


def write(folder: Path, config: ModelConfig, is_one_extent: bool) -> None:
    """Write a folder, or one whose matrices of a kind are together."""
    values = to_hf(config, "bfloat16", {"eos_token_id": 256})
    family = FAMILIES[values["model_type"]]
    plans = plan_weights(config, family, RandomWeights(config), torch.bfloat16, torch.float32)
    if not is_one_extent:
        kinds = ("gate_proj", "up_proj", "down_proj")
        plans = sorted(
            (replace(plan, layer=None, expert=None) for plan in plans),
            key=lambda plan: next((i for i, kind in enumerate(kinds) if kind in plan.name), -1),
        )
    write_model_folder(folder, values, plans, lambda _: None, {})
