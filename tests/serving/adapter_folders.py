"""Random LoRA folders as peft writes them, without peft."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

CONFIG = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "bias": "none",
    "target_modules": ["q_proj"],
}
FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
PREFIX = "base_model.model."


def pair(name: str, rank: int, inputs: int, outputs: int, seed: str = "") -> dict:
    """Return A and B of a module, drawn for its name."""
    generator = torch.Generator().manual_seed(sum(map(ord, name + seed)) + rank)
    a = torch.randn(rank, inputs, generator=generator) * inputs**-0.5
    b = torch.randn(outputs, rank, generator=generator)
    return {f"{PREFIX}{name}.lora_A.weight": a, f"{PREFIX}{name}.lora_B.weight": b}


def fused_experts(config, layer: int, rank: int, seed: str = "") -> dict:
    """Return the factors of all experts of a layer, in transformers 5's two parameters."""
    moe, path = config.moe, f"model.layers.{layer}.mlp.experts"
    ranks, d_model, d_expert = rank * moe.num_experts, config.d_model, moe.d_expert
    return {
        **pair(f"{path}.base_layer", ranks, d_model, 2 * d_expert, seed),
        **pair(path, ranks, d_expert, d_model, seed),
    }


def attention(config, layer: int, rank: int, seed: str = "") -> dict:
    """Return the factors of a layer's projections."""
    path, width = f"model.layers.{layer}.self_attn", config.num_heads * config.head_width
    kv_width = config.kv_heads * config.head_width
    shapes = {"q_proj": (config.d_model, width), "k_proj": (config.d_model, kv_width)}
    shapes |= {"v_proj": (config.d_model, kv_width), "o_proj": (width, config.d_model)}
    found: dict = {}
    for name, shape in shapes.items():
        found |= pair(f"{path}.{name}", rank, *shape, seed)
    return found


def everything(config, rank: int = 4, seed: str = "") -> dict:
    """Return factors of every attention, dense MLP and expert."""
    found: dict = {}
    for layer in range(config.num_layers):
        found |= attention(config, layer, rank, seed)
        if config.is_moe(layer):
            found |= fused_experts(config, layer, rank, seed)
            continue
        path = f"model.layers.{layer}.mlp"
        for name, inputs, outputs in (
            ("gate_proj", config.d_model, config.d_ff),
            ("up_proj", config.d_model, config.d_ff),
            ("down_proj", config.d_ff, config.d_model),
        ):
            found |= pair(f"{path}.{name}", rank, inputs, outputs, seed)
    return found


def write_adapter(folder: Path, tensors: dict, **changes) -> Path:
    """Write a folder with the configuration changed; None leaves a key out."""
    folder.mkdir(parents=True, exist_ok=True)
    values = CONFIG | {"target_parameters": FUSED} | changes
    (folder / "adapter_config.json").write_text(json.dumps(values))
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / "adapter_model.safetensors")
    return folder
