"""The experts of a model in two widths, both in memory."""

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import nn

from ...kernels.values.expert_weights import ExpertWeights
from ...kernels.values.quantize import quantize_experts
from ...kernels.values.quantized_weights import Bits, QuantizedExpertWeights
from ...moe.config.model import ModelConfig
from ...moe.experts.mixed import MixedExperts
from ...moe.experts.resident import Experts
from ...moe.folders.write_few_bits import choose_format
from ...moe.models.decoder import Decoder
from ...progress import Progress
from .search import Key

WIDE: Bits = 8
NARROW: Bits = 4


class TwoWidths(NamedTuple):
    """A layer's experts, each in both widths."""

    wide: QuantizedExpertWeights
    narrow: QuantizedExpertWeights


def round_experts(decoder: Decoder) -> dict[int, TwoWidths]:
    """Return the experts of each MoE layer in both widths: the bits that a folder gets."""
    layers = decoder.moe_layers()
    found = {}
    with Progress("rounding experts", len(layers)) as progress:
        for layer, module in layers:
            experts = module.experts
            assert isinstance(experts, Experts), "the source's experts are not rounded"
            wide, narrow = (_rounded(experts, decoder.config, bits) for bits in (WIDE, NARROW))
            found[layer] = TwoWidths(wide, narrow)
            progress.advance()
    return found


def _rounded(experts: Experts, config: ModelConfig, bits: Bits) -> QuantizedExpertWeights:
    parts = (experts.fc1, experts.fc2, experts.fc1_bias, experts.fc2_bias)
    weights = ExpertWeights.of(tuple(_data(part) for part in parts), activation=experts.activation)
    return quantize_experts(weights, bits, choose_format(config, bits).group_size)


def _data(part: nn.Parameter | None) -> torch.Tensor | None:
    return None if part is None else part.data


class NarrowSome:
    """A model whose experts change their widths in memory."""

    def __init__(self, decoder: Decoder, widths: dict[int, TwoWidths]) -> None:
        """Put ``widths`` in the place of the decoder's experts, which are freed."""
        self._modules: dict[int, MixedExperts] = {}
        for layer, module in decoder.moe_layers():
            pair = widths[layer]
            mixed = MixedExperts(pair, [0] * pair.wide.num_slots)
            module.experts = self._modules[layer] = mixed

    def narrow(self, keys: Collection[Key]) -> None:
        """Narrow these experts, and widen all others."""
        chosen = set(keys)
        for layer, mixed in self._modules.items():
            num_experts = len(mixed.kind_of_E)
            mixed.choose([int((layer, expert) in chosen) for expert in range(num_experts)])
