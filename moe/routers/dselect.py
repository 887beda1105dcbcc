"""DSelect-k (Hazimeh et al. 2021, "DSelect-k: Differentiable Selection in the Mixture of Experts").

T tokens, D model width, K selectors, M bits of an expert's number, E experts.
"""

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Generator, Tensor, nn

from .linear import LearnedConfig, project
from .loss_terms import GlobalCounts, LayerLosses, training_sum
from .router import Router, RouterSizes
from .routing import RouterInput, Routing
from .smooth_step import TINY, entropy, routing_of_weights, smooth_step, uniform, valid_sum
from .variation import add_sums, variation_loss

MIXING_BOUND = 0.05
"""The selectors' own weights begin in U(-0.05, 0.05), as in the released code."""


class DSelect(LearnedConfig):
    """k selectors, each of which spells an expert's number in bits (Hazimeh et al. 2021).

    Selector i has a value z for each bit, and ``S(z)`` is the probability that the bit is 1, where
    S is a step of width ``gamma`` that reaches exactly 0 and 1. Expert l has weight
    ``sum_i q_i r_il``: r is the product over the bits of l, and ``q`` a softmax over the selectors.
    At first a token visits all experts. Once all bits are decided, it visits at most k.
    Where the number of experts is not a power of two, a selector may spell a number without an
    expert, which adds nothing; ``validity_loss`` keeps selectors away from those.
    """

    paper: ClassVar[str] = "Hazimeh et al. 2021 (DSelect-k)"
    varies: ClassVar[bool] = True

    kind: Literal["dselect"] = "dselect"
    k: int = Field(default=2, ge=1)
    """Selectors; a token visits at most this many experts once their bits are decided."""
    gamma: float = Field(default=1.0, gt=0)
    """Width of the step: bits are decided where ``|z|`` exceeds half of it. The weights begin in
    proportion to it. If it is too small for the learning rate, the first steps decide all bits,
    alike for all tokens."""
    per_token: bool = True
    """Compute bits and ``q`` from each token. False: the same for all tokens (static gates)."""
    entropy_loss: float = Field(default=0.05, ge=0)
    """Coefficient of the selectors' entropy, a mean over tokens, summed over selectors. It makes
    the bits decide; without it the gate may stay dense."""
    validity_loss: float = Field(default=1.0, ge=0)
    """Coefficient of ``1 / sum_l r_il``, a mean over tokens, summed over selectors, if the number
    of experts is not a power of two. (The released code sums over the batch.)"""
    importance_loss: float = Field(default=0.0, ge=0)
    """Coefficient of the squared variation (variance / mean^2) of the experts' summed weights over
    the batch. The paper has none; without it a language model's tokens may all take the same k
    experts once they are decided."""

    def build(self, sizes: RouterSizes) -> "DSelectRouter":
        """Return the module."""
        return DSelectRouter(self, sizes.d_model, sizes.num_experts)

    def architecture(self) -> dict[str, Any]:
        """Return all but the losses' coefficients."""
        values = super().architecture()
        for name in ("entropy_loss", "validity_loss", "importance_loss"):
            del values[name]
        return values


class DSelectRouter(Router):
    """See :class:`DSelect`."""

    replays: ClassVar[bool] = True

    def __init__(self, config: DSelect, d_model: int, num_experts: int) -> None:
        super().__init__(config, num_experts)
        self.config: DSelect = config
        num_bits = config.k * (num_experts - 1).bit_length()
        if config.per_token:
            self.bit_weight = nn.Parameter(torch.empty(num_bits, d_model))
            self.mixing_weight = nn.Parameter(torch.empty(config.k, d_model))
        self.bit_bias = nn.Parameter(torch.empty(num_bits))
        self.mixing_bias = nn.Parameter(torch.empty(config.k))
        for name, parameter in self.named_parameters():
            nn.init.uniform_(parameter, -self._bound(name), self._bound(name))

    def _bound(self, name: str) -> float:
        """Return b of U(-b, b) from which a parameter begins."""
        if name.startswith("bit_"):
            return self.config.gamma / 100
        is_bias_of_tokens = name == "mixing_bias" and self.config.per_token
        return 0.0 if is_bias_of_tokens else MIXING_BOUND

    def initialize(self, name: str, generator: Generator) -> Tensor | None:
        """Return bits in U(-gamma/100, gamma/100) and mixing weights in U(-0.05, 0.05)."""
        return uniform(self.get_parameter(name).shape, self._bound(name), generator)

    def route(self, router_input: RouterInput) -> Routing:
        """Send each row to all experts that its selectors give a weight above zero."""
        x_TD, valid_T = router_input.x_TD, router_input.valid_T
        assert x_TD is not None, "the caller must pass hidden rows"
        bits_TKM, mixing_TK = self._read(x_TD)
        selected_TKE = spelled(smooth_step(bits_TKM, self.config.gamma), self.num_experts)
        weights_TE = (mixing_TK.softmax(dim=1).unsqueeze(-1) * selected_TKE).sum(dim=1)
        routing = routing_of_weights(weights_TE, valid_T, router_input.given_TK)
        if self.training:
            entropy_T = entropy(selected_TKE).sum(dim=1)
            routing.extras["entropy_sum"] = valid_sum(entropy_T, valid_T)
            if self.config.importance_loss:
                add_sums(routing, "importance_E", weights_TE, valid_T)
            invalid_T = (1 / (TINY + selected_TKE.sum(dim=-1))).sum(dim=1)
            routing.extras["invalid_sum"] = valid_sum(invalid_T, valid_T)
        return routing

    def _read(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Return each row's bits ``[T, K, M]`` and mixing logits ``[T, K]``, in fp32 or fp64."""
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        bit_bias, mixing_bias = self.bit_bias.to(dtype), self.mixing_bias.to(dtype)
        if self.config.per_token:
            bits = project(x_TD, self.bit_weight) + bit_bias
            mixing_TK = project(x_TD, self.mixing_weight) + mixing_bias
        else:
            bits = bit_bias.expand(len(x_TD), -1)
            mixing_TK = mixing_bias.expand(len(x_TD), -1)
        return bits.unflatten(1, (self.k, bits.shape[1] // self.k)), mixing_TK

    def losses(self, routing: Routing, counts: GlobalCounts) -> LayerLosses:
        """Return entropy and validity, means over tokens, and the variation of importance."""
        num_tokens = counts.num_tokens.clamp(min=1)
        terms = [self.config.entropy_loss * training_sum(routing, "entropy_sum") / num_tokens]
        if self.num_experts & (self.num_experts - 1):
            terms.append(
                self.config.validity_loss * training_sum(routing, "invalid_sum") / num_tokens
            )
        if self.config.importance_loss:
            importance = variation_loss(routing, counts, "importance_E")
            terms.append(self.config.importance_loss * importance)
        return LayerLosses(tuple(terms))


def spelled(ones_TKM: Tensor, num_experts: int) -> Tensor:
    """Return the probability that a selector spells each expert's number, ``[T, K, E]``.

    ``ones_TKM`` are the probabilities that a bit is 1, the most significant bit first.
    """
    codes = ones_TKM.new_ones((*ones_TKM.shape[:-1], 1))
    for one in ones_TKM.unbind(dim=-1):
        bit = torch.stack((1 - one, one), dim=-1)
        codes = (codes.unsqueeze(-1) * bit.unsqueeze(-2)).flatten(-2)
    return codes[..., :num_experts]
