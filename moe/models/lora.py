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
from ..layer import MoELayer
from ..linear import Linear
from .decoder import Decoder
from .decoder_layer import DecoderLayer
from .initialize import generator_of

LoraTarget = Literal["attention", "experts"]


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
    decoder: Decoder, rank: int, alpha: float, targets: Sequence[LoraTarget], seed: int
) -> None:
    """Freeze ``decoder`` and give its ``targets`` updates that train, with ``s = alpha / rank``.

    ``attention``: every projection of every attention. ``experts``: gate, up and down of every
    routed expert in this process; gate and up have an A each. B starts as 0, so the model is the
    same function. A is uniform in ``+- in_features**-0.5`` (peft's default), drawn in fp32 for each
    (seed, name, expert), independent of the rank that holds it.
    """
    decoder.requires_grad_(False)
    for layer in decoder.layers:
        assert isinstance(layer, DecoderLayer)
        if "attention" in targets:
            for name, linear in list(layer.self_attn.named_children()):
                if isinstance(linear, Linear):
                    setattr(layer.self_attn, name, LoraLinear(linear, rank, alpha / rank))
        if "experts" in targets and isinstance(layer.mlp, MoELayer):
            assert isinstance(layer.mlp.experts, Experts)
            layer.mlp.experts.add_low_rank(rank, alpha / rank)
    for key, a_PD in _every_a(decoder):
        bound = a_PD.shape[-1] ** -0.5
        drawn = torch.rand(a_PD.shape, generator=generator_of(f"{seed}/{key}"))
        a_PD.copy_((2 * drawn - 1) * bound)


def _every_a(decoder: Decoder) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in decoder.named_parameters():
        if not name.endswith("lora_a"):
            continue
        owner = decoder.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, Experts):
            for slot, expert in enumerate(owner.expert_ids):
                yield f"{name}/{expert}", parameter.data[slot]
        else:
            yield name, parameter.data


def merged(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return ``weight + scale * b @ a``, computed at least in fp32 and not rounded to less."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.addmm(weight.to(dtype), b.to(dtype), a.to(dtype), alpha=scale)
