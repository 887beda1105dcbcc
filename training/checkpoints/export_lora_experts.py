"""The LoRA experts of a checkpoint, as an adapter folder has them."""

import re
from typing import Any

import torch
from torch import Tensor

from ...moe.folders.lora_experts import LoraExpertsConfig
from .checkpoint import StoredTensors

_ATTENTION = re.compile(r"weight/(layers\.\d+\.self_attn\.\w+)\.lora_([ab])")
_ROUTER = re.compile(r"weight/(layers\.\d+\.mlp)\.gate\.(weight|bias)")
_EXPERTS = re.compile(r"weight/(layers\.\d+\.mlp)\.lora_experts\.fc([12])_lora_([ab])")


def lora_experts_config(lora: dict[str, Any]) -> LoraExpertsConfig:
    """Return the folder's configuration from a run's ``lora`` section."""
    return LoraExpertsConfig(
        rank=lora["rank"],
        alpha=lora["alpha"],
        experts=lora["experts"],
        weighting=lora["weighting"],
    )


def lora_experts_tensors(stored: StoredTensors) -> dict[str, Tensor]:
    """Return the folder's tensors in fp32, by their names there.

    A checkpoint has gate and up together: A and B of the gate first, then of up.
    """
    found: dict[str, Tensor] = {}
    for key in stored:
        attention, router = _ATTENTION.fullmatch(key), _ROUTER.fullmatch(key)
        experts = _EXPERTS.fullmatch(key)
        if attention is not None:
            found[f"model.{attention[1]}.lora_{attention[2].upper()}"] = stored[key]
        elif router is not None:
            found[f"model.{router[1]}.router.{router[2]}"] = stored[key]
        elif experts is not None:
            path, matrix = f"model.{experts[1]}", f"lora_{experts[3].upper()}"
            if experts[2] == "2":
                found[f"{path}.down_proj.{matrix}"] = stored[key]
            else:
                gate, up = stored[key].chunk(2, dim=1)
                found[f"{path}.gate_proj.{matrix}"] = gate
                found[f"{path}.up_proj.{matrix}"] = up
    return {name: tensor.to(torch.float32) for name, tensor in found.items()}
