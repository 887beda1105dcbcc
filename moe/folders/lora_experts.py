"""Adapter folders of LoRA experts (models/lora_experts.py), which peft's format cannot say.

The configuration has a ``peft_type`` that peft does not know, and the tensors are in a file that
peft does not look for, so that nothing opens such a folder as a plain LoRA.

E LoRA experts, P rank, D model width, F inner width, I inputs and O outputs of a linear layer.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import save_file
from torch import Tensor

from ...errors import ModelFileError
from ..models.lora_experts import LoraMixture, Weighting
from .json_file import read_json
from .writer import whole_folder

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "lora_experts.safetensors"
KIND = "MOEYARD_LORA_EXPERTS"
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class LoraExpertsConfig(BaseModel):
    """``adapter_config.json`` of LoRA experts."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    peft_type: Literal["MOEYARD_LORA_EXPERTS"] = "MOEYARD_LORA_EXPERTS"
    version: Literal[1] = 1
    rank: int = Field(ge=1)
    alpha: float = Field(gt=0)
    experts: int = Field(ge=2)
    weighting: Weighting

    @property
    def scale(self) -> float:
        """s, the factor on ``B A``."""
        return self.alpha / self.rank

    @property
    def mixture(self) -> LoraMixture:
        """How the experts are chosen."""
        return LoraMixture(self.experts, self.weighting)

    def mlp_shapes(self, d_model: int, d_ff: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of an MLP's tensors by their names below ``model.layers.N.mlp``.

        ``router.weight [E, D]`` and ``router.bias [E]``; of each projection ``lora_A [E, P, I]``
        and ``lora_B [E, O, P]``.
        """
        shapes: dict[str, tuple[int, ...]] = {
            "router.weight": (self.experts, d_model),
            "router.bias": (self.experts,),
        }
        for name in PROJECTIONS:
            inputs, outputs = (d_ff, d_model) if name == "down_proj" else (d_model, d_ff)
            shapes[f"{name}.lora_A"] = (self.experts, self.rank, inputs)
            shapes[f"{name}.lora_B"] = (self.experts, outputs, self.rank)
        return shapes


def is_lora_experts(folder: Path) -> bool:
    """Say whether an adapter folder has LoRA experts; :class:`ModelFileError` if it is damaged."""
    path = folder / CONFIG_FILE
    return path.exists() and read_json(path).get("peft_type") == KIND


def read_lora_experts_config(folder: Path) -> LoraExpertsConfig:
    """Read the configuration, or raise :class:`ModelFileError` with the key that is wrong."""
    try:
        return LoraExpertsConfig.model_validate(read_json(folder / CONFIG_FILE))
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        raise ModelFileError(
            f"{folder / CONFIG_FILE} has {key} = {str(problem['input'])[:80]!r} "
            f"({problem['msg']}); export the adapter again."
        ) from None


def write_lora_experts(
    target: Path, config: LoraExpertsConfig, tensors: Mapping[str, Tensor]
) -> None:
    """Write the folder whole or not at all.

    ``tensors`` are those of :meth:`LoraExpertsConfig.mlp_shapes` of each layer, and of attention
    ``model.layers.N.self_attn.q_proj.lora_A [P, I]`` and ``.lora_B [O, P]``. Raises
    :class:`ModelFileError` if ``target`` exists already or cannot be written.
    """
    with whole_folder(target) as unfinished:
        text = json.dumps(config.model_dump(mode="json"), indent=2, sort_keys=True)
        (unfinished / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(plain, unfinished / TENSOR_FILE, metadata={"format": "pt"})
