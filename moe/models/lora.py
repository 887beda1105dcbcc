"""Low-rank updates (LoRA, Hu et al. 2021): ``W x + s B A x`` with W frozen, A and B trained.

A decoder with them is for training and evaluation. Caches and decode kernels read W alone, so a
model is served after its export, which adds ``s B A`` to W, or with A and B as an adapter
(moe/adapters).

P rank, S slots, D model width, F expert width.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters.rows import AdapterRows
from ..experts.resident import Experts
from ..gated_mlp import GatedMLP
from ..layer import MoELayer
from ..linear import Linear
from .decoder import Decoder
from .decoder_layer import DecoderLayer
from .initialize import generator_of
from .lora_experts import LoraExperts, LoraExpertsMLP, LoraMixture

LoraTarget = Literal["attention", "mlp", "experts"]


class LoraLinear(Linear):
    """A linear layer with a low-rank update; its weight and bias are those of ``base``."""

    def __init__(self, base: Linear, rank: int, scale: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight = base.weight
        self.register_parameter("bias", base.bias)
        self.lora_a = nn.Parameter(base.weight.new_empty(rank, base.in_features))
        self.lora_b = nn.Parameter(base.weight.new_zeros(base.out_features, rank))
        self.scale = scale

    def forward(self, x: Tensor, adapters: AdapterRows | None = None) -> Tensor:
        """Return ``x @ weight.T + bias + scale * x @ A.T @ B.T``, ``[T, out_features]``."""
        low_TP = F.linear(x, self.lora_a)
        return super().forward(x, adapters) + self.scale * F.linear(low_TP, self.lora_b)


def add_lora(
    decoder: Decoder,
    rank: int,
    alpha: float,
    targets: Sequence[LoraTarget],
    seed: int,
    mixture: LoraMixture | None = None,
) -> None:
    """Freeze ``decoder`` and give its ``targets`` updates that train, with ``s = alpha / rank``.

    ``attention``: every projection of every attention. ``mlp``: gate, up and down of every dense
    layer; with a ``mixture`` these are LoRA experts (lora_experts.py). ``experts``: gate, up and
    down of every routed expert in this process; gate and up have an A each. B starts as 0, so the
    model is the same function. A is uniform in ``+- in_features**-0.5`` (peft's default), drawn in
    fp32 for each (seed, name, expert), independent of the rank that holds it.
    """
    decoder.requires_grad_(False)
    scale = alpha / rank
    for layer in decoder.layers:
        assert isinstance(layer, DecoderLayer)
        if "attention" in targets:
            _add_to_linears(layer.self_attn, rank, scale)
        if "mlp" in targets and isinstance(layer.mlp, GatedMLP):
            if mixture is None:
                _add_to_linears(layer.mlp, rank, scale)
            else:
                layer.mlp = LoraExpertsMLP(layer.mlp, mixture, rank, scale)
        if "experts" in targets and isinstance(layer.mlp, MoELayer):
            assert isinstance(layer.mlp.experts, Experts)
            layer.mlp.experts.add_low_rank(rank, scale)
    for key, a_PD in _every_a(decoder):
        bound = a_PD.shape[-1] ** -0.5
        drawn = torch.rand(a_PD.shape, generator=generator_of(f"{seed}/{key}"))
        a_PD.copy_((2 * drawn - 1) * bound)
    if mixture is not None:
        _draw_routers(decoder, seed)


def _add_to_linears(module: nn.Module, rank: int, scale: float) -> None:
    for name, linear in list(module.named_children()):
        if isinstance(linear, Linear):
            setattr(module, name, LoraLinear(linear, rank, scale))


def _draw_routers(decoder: Decoder, seed: int) -> None:
    """Draw the routers of LoRA experts, normal with std ``d_model**-0.5``; biases are 0."""
    for layer, router in decoder.routed_layers():
        weight_ED = router.get_parameter("weight").data
        name = f"layers.{layer}.mlp.gate.weight"
        drawn = torch.randn(weight_ED.shape, generator=generator_of(f"{seed}/{name}"))
        weight_ED.copy_(drawn * weight_ED.shape[1] ** -0.5)


def _every_a(decoder: Decoder) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in decoder.named_parameters():
        if not name.endswith("lora_a"):
            continue
        owner = decoder.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, Experts):
            for slot, expert in enumerate(owner.expert_ids):
                yield f"{name}/{expert}", parameter.data[slot]
        elif isinstance(owner, LoraExperts):
            for expert, a_PD in enumerate(parameter.data):
                yield f"{name}/{expert}", a_PD
        else:
            yield name, parameter.data


def merged(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return ``weight + scale * b @ a``, computed at least in fp32 and not rounded to less."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.addmm(weight.to(dtype), b.to(dtype), a.to(dtype), alpha=scale)
