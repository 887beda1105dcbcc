"""The cosine router (X-MoE, Chi et al. 2022): tokens and experts meet in a narrow space.

T tokens, D model width, P width of the comparison, E experts, K choices.
"""

import math
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor, nn

from ...kernels.router import choose
from ...kernels.values.choice import ChoiceRule
from .linear import LearnedConfig, project
from .loss_terms import GlobalCounts, LayerLosses, balance_and_z
from .router import Router, RouterSizes
from .routing import RouterInput, Routing, routing_of

LOWEST_TEMPERATURE = 0.01
"""A learned temperature does not go below it, so that logits stay below 100 (Tutel)."""


class Cosine(LearnedConfig):
    """Scores are cosines of a projected token and each expert's vector, over a temperature.

    An expert cannot win because its vector is long, so tokens do not crowd around a few experts
    (X-MoE, Chi et al. 2022). The defaults are the paper's. Its code is ``width: 16``,
    ``normalize_token: false``, ``temperature: null``.
    """

    paper: ClassVar[str] = "Chi et al. 2022 (X-MoE)"

    kind: Literal["cosine"] = "cosine"
    k: int = Field(default=1, ge=1)
    """Experts each token visits."""
    width: int | None = Field(default=None, ge=1)
    """Width of the comparison; null = half the number of experts."""
    normalize_token: bool = True
    """Divide the projected token by its length; if not, longer tokens are surer."""
    temperature: float | None = Field(default=0.07, gt=0)
    """Divides the cosines; null = 1."""
    learn_temperature: bool = True
    """Train the temperature, which begins at ``temperature`` and stays above 0.01."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """How logits become scores."""
    renormalize: bool = False
    """Divide the chosen scores by their sum."""
    balance_loss: float = Field(default=0.01, ge=0)
    """Coefficient of the Switch/GShard balance loss; at perfect balance the loss itself is 1."""
    z_loss: float = Field(default=0.0, ge=0)
    """Coefficient of the ST-MoE z-loss."""

    def build(self, sizes: RouterSizes) -> "CosineRouter":
        """Return the module."""
        return CosineRouter(self, sizes)

    def architecture(self) -> dict[str, Any]:
        """Return all but the coefficients of losses."""
        values = self.model_dump(mode="json", exclude={"balance_loss", "z_loss"})
        values["learn_temperature"] = self.has_weight_for_temperature()
        if self.has_weight_for_temperature():
            del values["temperature"]  # only where it begins
        return values

    def has_weight_for_temperature(self) -> bool:
        """Return whether the temperature is a parameter."""
        return self.temperature is not None and self.learn_temperature


class CosineRouter(Router):
    """See :class:`Cosine`. No forward changes a weight, in training or evaluation."""

    def __init__(self, config: Cosine, sizes: RouterSizes) -> None:
        super().__init__(config, sizes.num_experts)
        self.config: Cosine = config
        self.rule = ChoiceRule(k=config.k, score=config.score, renormalize=config.renormalize)
        width = config.width or max(1, sizes.num_experts // 2)
        self.projection_PD = nn.Parameter(torch.empty(width, sizes.d_model))
        nn.init.normal_(self.projection_PD, std=sizes.d_model**-0.5)
        self.directions_EP = nn.Parameter(
            nn.init.orthogonal_(torch.empty(sizes.num_experts, width))
        )
        learns = config.has_weight_for_temperature()
        self.log_temperature = nn.Parameter(self._first_log_temperature()) if learns else None

    def initialize(self, name: str, generator: Generator) -> Tensor | None:
        """Return orthogonal directions, and the temperature of the configuration."""
        if name == "directions_EP":
            return nn.init.orthogonal_(torch.empty(self.directions_EP.shape), generator=generator)
        if name == "log_temperature":
            return self._first_log_temperature()
        return None

    def route(self, router_input: RouterInput) -> Routing:
        """Choose the k nearest experts of each row of ``x_TD``."""
        x_TD, valid_T = router_input.x_TD, router_input.valid_T
        assert x_TD is not None, "the caller must pass hidden rows"
        logits_TE = self.logits(x_TD)
        choices = choose(logits_TE, None, valid_T, self.rule, wants_sums=self.training)
        return routing_of(choices, valid_T)

    def logits(self, x_TD: Tensor) -> Tensor:
        """Return each row's cosines over the temperature, ``[T, E]``, in fp32 or fp64."""
        places_TP = project(x_TD, self.projection_PD)
        if self.config.normalize_token:
            places_TP = F.normalize(places_TP, dim=-1)
        directions_EP = F.normalize(self.directions_EP.to(places_TP.dtype), dim=-1)
        logits_TE = project(places_TP, directions_EP)
        if self.log_temperature is not None:
            lowest = math.log(LOWEST_TEMPERATURE)
            return logits_TE * (-self.log_temperature.clamp(min=lowest)).exp().to(logits_TE.dtype)
        return logits_TE if self.config.temperature is None else logits_TE / self.config.temperature

    def losses(self, routing: Routing, counts: GlobalCounts) -> LayerLosses:
        """Return balance and z."""
        config = self.config
        return balance_and_z(routing, counts, self.k, config.balance_loss, config.z_loss)

    def _first_log_temperature(self) -> Tensor:
        assert self.config.temperature is not None
        return torch.tensor(math.log(self.config.temperature))
