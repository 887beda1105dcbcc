"""Turn the low-rank updates of a run's newest checkpoint into an adapter folder: peft's, if it can
say them.

E experts, P rank, D model width, F expert width.
"""

import re
from pathlib import Path

import torch
from torch import Tensor

from ...errors import CheckpointError, ConfigError
from ...moe.config.model import ModelConfig
from ...moe.folders.families.family import full_name
from ...moe.folders.hf_config import to_hf
from ...moe.folders.lora_experts import write_lora_experts
from ...moe.folders.peft.experts import joined, to_peft
from ...moe.folders.peft.tensors import Factors
from ...moe.folders.peft.write import adapter_config, write_adapter_folder
from .checkpoint import StoredTensors
from .export import newest
from .export_lora_experts import lora_experts_config, lora_experts_tensors
from .files import read_state

_LINEAR = re.compile(r"weight/(layers\.\d+\.(?:self_attn|mlp)\.\w+)\.lora_a")
_EXPERTS = re.compile(r"weight/layers\.(\d+)\.mlp\.experts\.0\.fc1_lora_a")


def export_adapter(run_dir: Path, target: Path) -> int:
    """Write ``target`` from the newest whole checkpoint of a LoRA run and return its step.

    Only what trained is written; the model that the run started from is the base. Raises
    :class:`ConfigError` for a run without low-rank updates.
    """
    checkpoint = newest(run_dir)
    state = read_state(checkpoint)
    lora = state.get("lora")
    if lora is None:
        raise ConfigError(
            f"{run_dir} has train.parameters {state.get('parameters', 'all')}, so it has no "
            "adapter; export it without --adapter."
        )
    model, stored = ModelConfig.model_validate(state["model"]), StoredTensors(checkpoint)
    if lora["experts"]:
        write_lora_experts(target, lora_experts_config(lora), lora_experts_tensors(stored))
        return int(state["step"])
    origin = state.get("origin") or {}
    family = to_hf(model, "float32", source=origin.get("config"))["model_type"]
    factors: dict[str, Factors] = {}
    for key in stored:
        linear, experts = _LINEAR.fullmatch(key), _EXPERTS.fullmatch(key)
        if linear is not None:
            b_key = key.removesuffix("a") + "b"
            factors[full_name(linear[1])] = Factors(_narrow(stored[key]), _narrow(stored[b_key]))
        elif experts is not None:
            factors |= _experts(stored, model, int(experts[1]), family == "gpt_oss")
    has_experts = any(name.endswith(".experts") for name in factors)
    # Experts have a gate_proj too, so MLPs of dense layers are named with their layer.
    of_all_experts = (".experts", ".base_layer")
    names = {name.removeprefix("model.") for name in factors if not name.endswith(of_all_experts)}
    names = {_peft_name(name) for name in names}
    config = adapter_config(lora["rank"], lora["alpha"], sorted(names), has_experts)
    if not factors:
        raise CheckpointError(f"checkpoint {checkpoint} has no A and B; restore it from a backup.")
    write_adapter_folder(target, config, factors)
    return int(state["step"])


def _peft_name(name: str) -> str:
    """Return what ``target_modules`` calls a linear layer; those of dense MLPs by their path."""
    is_short = ".self_attn." in name or ".mlp.experts." in name
    return name.rpartition(".")[2] if is_short else name


def _experts(
    stored: StoredTensors, model: ModelConfig, layer: int, is_interleaved: bool
) -> dict[str, Factors]:
    """Return the factors of a layer's two fused parameters; the first is the inner one in peft.

    Of experts without a gate, which transformers does not have, each expert's matrices are named.
    """
    assert model.moe is not None, "experts without a MoE layer"

    def all_experts(name: str) -> Tensor:
        prefix = f"weight/layers.{layer}.mlp.experts"
        numbers = range(model.moe.num_experts)  # type: ignore[union-attr]
        return torch.stack([_narrow(stored[f"{prefix}.{expert}.{name}"]) for expert in numbers])

    path = full_name(f"layers.{layer}.mlp.experts")
    if "gate" not in model.moe.fc1_parts:
        return {
            f"{path}.{expert}.{part}_proj": Factors(a_PI, b_OP)
            for part, fc in (("up", "fc1"), ("down", "fc2"))
            for expert, (a_PI, b_OP) in enumerate(
                zip(all_experts(f"{fc}_lora_a"), all_experts(f"{fc}_lora_b"), strict=True)
            )
        }
    gate_a_EPD, up_a_EPD = all_experts("fc1_lora_a").chunk(2, dim=1)
    gate_b_EFP, up_b_EFP = all_experts("fc1_lora_b").chunk(2, dim=1)
    a_EPD, b_EHP = joined((gate_a_EPD, gate_b_EFP), (up_a_EPD, up_b_EFP))
    if is_interleaved:  # gpt-oss has gate and up rows in turn
        b_EHP = torch.stack(b_EHP.chunk(2, dim=1), dim=2).flatten(1, 2)
    down = to_peft(all_experts("fc2_lora_a"), all_experts("fc2_lora_b"))
    return {f"{path}.base_layer": to_peft(a_EPD, b_EHP), path: down}


def _narrow(tensor: Tensor) -> Tensor:
    """Return a factor in fp32; runs in fp64 are made for tests of exactness."""
    return tensor.to(torch.float32)
