"""Write an adapter folder that peft opens.

S experts in order, P rank, D model width, F expert width.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from ....errors import ModelFileError
from ....files import sync
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
    """Write the folder under a hidden name and rename it when it is complete.

    ``factors`` are by the module's name, as in :func:`read_factors`. Raises
    :class:`ModelFileError` if ``target`` exists already or cannot be written.
    """
    if target.exists():
        raise ModelFileError(f"{target} exists already; remove it or choose another folder.")
    tensors = {}
    for name, pair in factors.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = pair.a.contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = pair.b.contiguous()
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a killed attempt
    try:
        temporary.mkdir(parents=True)
        text = json.dumps(dict(config), indent=2, sort_keys=True)
        (temporary / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        save_file(tensors, temporary / TENSOR_FILE, metadata={"format": "pt"})
        for path in (temporary / CONFIG_FILE, temporary / TENSOR_FILE, temporary):
            sync(path)
        temporary.rename(target)
        sync(target.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise ModelFileError(
            f"{target} could not be written ({error.strerror or error}); "
            "free space or choose another folder."
        ) from None
