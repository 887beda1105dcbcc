"""Write an adapter folder that peft opens.

S experts in order, P rank, D model width, F expert width.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from ..writer import whole_folder
from .config import FILE as CONFIG_FILE
from .tensors import FILE as TENSOR_FILE
from .tensors import PREFIX, Factors

GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"


def adapter_config(
    rank: int, alpha: float, modules: list[str], has_experts: bool
) -> dict[str, Any]:
    """Return adapter_config.json.

    The experts' gate and up are one parameter in transformers 5. Two updates of rank r are one of
    rank 2 r there, with alpha doubled, so that s stays alpha / r.
    """
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_dora": False,
        "use_rslora": False,
        "modules_to_save": None,
        "target_modules": modules,
        "target_parameters": [GATE_UP, DOWN] if has_experts else None,
        "rank_pattern": {GATE_UP: 2 * rank} if has_experts else {},
        "alpha_pattern": {GATE_UP: 2 * alpha} if has_experts else {},
    }


def write_adapter_folder(
    target: Path, config: Mapping[str, Any], factors: Mapping[str, Factors]
) -> None:
    """Write the folder whole or not at all.

    ``factors`` are by the module's name, as in :func:`read_factors`. Raises
    :class:`ModelFileError` if ``target`` exists already or cannot be written.
    """
    tensors = {}
    for name, pair in factors.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = pair.a.contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = pair.b.contiguous()
    with whole_folder(target) as unfinished:
        text = json.dumps(dict(config), indent=2, sort_keys=True)
        (unfinished / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        save_file(tensors, unfinished / TENSOR_FILE, metadata={"format": "pt"})
