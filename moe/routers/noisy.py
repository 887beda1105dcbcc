"""Routers that draw: noise on the scores, a second expert by chance.

T tokens, D model width, E experts, K choices.
"""

from collections.abc import Callable
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Generator, Tensor, nn

from ...kernels.router import choose
from ...kernels.values.choice import ChoiceRule
from .capacity import LimitedConfig, apply_capacity, drop
from .draws import draw_rows
from .given import fill_places
from .linear import LinearRouter, Stepped, project, route_in_one_call
from .loss_terms import GlobalCounts, LayerLosses, balance_and_z
from .router import RouterSizes
from .routing import RouterInput, Routing, count_choices, routing_of
from .variation import (
    Scores,
    add_sums,
    chance_above_kth,
    chance_above_rivals,
    variation_loss,
    weights_by_expert,
)

PURPOSES = NOISE, JITTER, SECOND = range(3)
"""What random numbers are for."""
MOST_LAYERS = 10_007
"""Seeds of draws are this far apart, so that a seed and a layer do not meet another pair."""
NOISE_FLOOR = 0.01
"""Smallest standard deviation of learned noise (tensor2tensor)."""


class Noisy(LimitedConfig):
    """Top-k with noise in training: the routers of Shazeer et al. 2017, V-MoE, GShard and Switch.

    The defaults are Shazeer's. docs/routers.md has the settings of the others. Evaluation draws
    nothing and drops nothing.
    """

    paper: ClassVar[str] = "Shazeer et al. 2017; GShard; Switch; V-MoE"

    kind: Literal["noisy"] = "noisy"
    noise: Literal["none", "learned", "constant"] = "learned"
    """Normal noise on the logits in training. ``learned``: with standard deviation
    ``softplus(x @ noise_weight.T) + 0.01`` (Shazeer). ``constant``: ``noise_std / E`` (V-MoE)."""
    noise_std: float = Field(default=1.0, gt=0)
    """Size of constant noise."""
    jitter: float = Field(default=0.0, ge=0, lt=1)
    """Training multiplies the router's input by U(1 - jitter, 1 + jitter) (Switch: 0.01)."""
    renormalize: bool = True
    """Divide the chosen probabilities by their sum, before any choice is dropped."""
    second_expert: Literal["all", "none", "threshold", "random"] = "all"
    """Who visits the second of two experts. ``threshold``: tokens whose second weight is above
    ``second_threshold``. ``random``: with probability weight / threshold (GShard), in evaluation
    all. A first expert's weight is the same without a second. Those left out count as dropped."""
    second_threshold: float = Field(default=0.2, gt=0, le=1)
    """See ``second_expert``."""
    importance_loss: float = Field(default=0.1, ge=0)
    """Coefficient of the squared variation (variance / mean^2) of the experts' summed weights
    (Shazeer), or summed probabilities without noise if noise is constant (V-MoE)."""
    load_loss: float = Field(default=0.1, ge=0)
    """Coefficient of the squared variation of the experts' expected rows, with a gradient that
    comes from the noise. Variances are unbiased: V-MoE's coefficients times (E - 1) / E."""
    balance_loss: float = Field(default=0.0, ge=0)
    """Coefficient of the Switch/GShard balance loss; at perfect balance the loss itself is 1."""
    balance_counts: Literal["all", "first"] = "all"
    """Choices, before drops, that the balance loss counts: all, or first ones only (GShard)."""
    z_loss: float = Field(default=0.0, ge=0)
    """Coefficient of the ST-MoE z-loss."""
    seed: int = 0
    """Seed of the draws."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.second_expert != "all" and self.k != 2:
            raise ValueError(
                f"second_expert is {self.second_expert}, but k is {self.k}; use k: 2, or "
                "second_expert: all."
            )
        if self.noise == "none" and self.load_loss:
            raise ValueError(
                f"load_loss is {self.load_loss}, but noise is none, and the loss gets its gradient "
                "from noise; set load_loss: 0 or choose a noise."
            )
        return self

    def build(self, sizes: RouterSizes) -> "NoisyRouter":
        """Return the module."""
        return NoisyRouter(self, sizes)

    def architecture(self) -> dict[str, Any]:
        """Return what evaluation depends on, and whether noise has weights."""
        values = {name: getattr(self, name) for name in ("kind", "k", "lookahead", "renormalize")}
        values["noise_is_learned"] = self.noise == "learned"
        if self.second_expert in ("none", "threshold"):
            values["second_expert"] = self.second_expert
        if self.second_expert == "threshold":
            values["second_threshold"] = self.second_threshold
        return values

    def draws(self) -> bool:
        """Return whether training needs random numbers."""
        return self.noise != "none" or self.jitter > 0 or self.second_expert == "random"


class NoisyRouter(Stepped, LinearRouter):
    """See :class:`Noisy`. A replay weighs and counts by scores with the noise of its step."""

    replays: ClassVar[bool] = True

    def __init__(self, config: Noisy, sizes: RouterSizes) -> None:
        super().__init__(config, sizes.d_model, sizes.num_experts)
        self.config: Noisy = config
        self.layer = sizes.layer
        self.rule = ChoiceRule(k=config.k, renormalize=config.renormalize)
        learned = torch.zeros(sizes.num_experts, sizes.d_model)
        self.noise_weight = nn.Parameter(learned) if config.noise == "learned" else None
        self.start_steps()

    def initialize(self, name: str, generator: Generator) -> Tensor | None:
        """Return zeros for ``noise_weight``: all rows start with the same noise (Shazeer)."""
        return torch.zeros(self.weight.shape) if name == "noise_weight" else None

    def route(self, router_input: RouterInput) -> Routing:
        """Choose the k best experts of each row of ``x_TD``."""
        x_TD, valid_T, given_TK = router_input.x_TD, router_input.valid_T, router_input.given_TK
        assert x_TD is not None, "the caller must pass hidden rows"
        if not self.training:
            arguments = (x_TD, self.weight, None, None, valid_T, self.rule)
            found = route_in_one_call(*arguments)
            if found is not None and given_TK is not None:
                given_TK = self._before_drops(given_TK, found.experts_TK)
                found = route_in_one_call(*arguments, given_TK)
            if found is not None:
                self._drop_seconds(found, router_input)
                return found
        scores = self._scores(x_TD, router_input)
        rows = (scores.noisy_TE, None, valid_T, self.rule, self.training)
        choices = choose(*rows)
        own_TK = choices.experts_TK
        if given_TK is not None:
            choices = choose(*rows, given_TK=self._before_drops(given_TK, own_TK))
        routing = routing_of(choices, valid_T)
        if self.training:
            self._add_sums(routing, own_TK, scores, valid_T)
        self._drop_seconds(routing, router_input)
        if self.training and self.config.capacity is not None:
            apply_capacity(routing, scores.noisy_TE.softmax(-1), self.config.capacity, router_input)
        return routing

    def _before_drops(self, given_TK: Tensor, own_TK: Tensor) -> Tensor:
        """Return recorded choices before some of them were dropped."""
        config = self.config
        drops = config.second_expert in ("none", "threshold")
        if self.training:
            drops = config.second_expert != "all" or config.capacity is not None
        return fill_places(given_TK, own_TK, self.k) if drops else given_TK

    def losses(self, routing: Routing, counts: GlobalCounts) -> LayerLosses:
        """Return balance, z, and the variation of importance and load over the global batch."""
        config, k, chosen_E = self.config, self.k, None
        if config.balance_counts == "first":
            k, chosen_E = 1, counts.extra.get("first_E")
        found = balance_and_z(
            routing, counts, k, config.balance_loss, config.z_loss, chosen_E=chosen_E
        )
        terms = list(found.terms)
        if config.importance_loss:
            importance = variation_loss(routing, counts, "importance_E")
            terms.append(config.importance_loss * importance)
        if config.load_loss:
            terms.append(config.load_loss * variation_loss(routing, counts, "load_E"))
        return found._replace(terms=tuple(terms))

    def _scores(self, x_TD: Tensor, router_input: RouterInput) -> Scores:
        """Return the logits, with noise if in training."""
        config = self.config
        if self.training and config.jitter:
            drawn_TD = self._draw(router_input, JITTER, torch.rand, x_TD)
            x_TD = x_TD * (1 + config.jitter * (2 * drawn_TD - 1))
        clean_TE = project(x_TD, self.weight)
        if not self.training or config.noise == "none":
            return Scores(clean_TE, clean_TE, torch.zeros_like(clean_TE))
        if self.noise_weight is not None:
            std_TE = F.softplus(project(x_TD, self.noise_weight)) + NOISE_FLOOR
        else:
            std_TE = torch.full_like(clean_TE, config.noise_std / self.num_experts)
        drawn_TE = self._draw(router_input, NOISE, torch.randn, clean_TE)
        return Scores(clean_TE, clean_TE + drawn_TE * std_TE, std_TE)

    def _draw(
        self, given: RouterInput, purpose: int, function: Callable[..., Tensor], like: Tensor
    ) -> Tensor:
        """Return numbers in the shape of ``like``, whose rows are tokens."""
        stream = (self.config.seed * MOST_LAYERS + self.layer) * len(PURPOSES) + purpose

        def draw(rows: int, generator: Generator | None) -> Tensor:
            return function(rows, *like.shape[1:], generator=generator)

        drawn = draw_rows(given, len(like), int(self.step), stream, draw)
        return drawn.to(like.device, torch.promote_types(like.dtype, torch.float32))

    def _add_sums(
        self, routing: Routing, own_TK: Tensor, scores: Scores, valid_T: Tensor | None
    ) -> None:
        """Store what the losses need of this rank. ``own_TK`` is what the router itself chose."""
        config = self.config
        if config.balance_counts == "first":
            first_T1 = routing.experts_TK[:, :1]
            routing.extra_counts["first_E"] = count_choices(first_T1, self.num_experts)
        if config.importance_loss:
            if config.noise == "constant":
                weights_TE = scores.clean_TE.softmax(dim=-1)
            else:
                weights_TE = weights_by_expert(routing, self.num_experts)
            add_sums(routing, "importance_E", weights_TE, valid_T)
        if config.load_loss:
            values = (scores.clean_TE, scores.noisy_TE, scores.std_TE)
            if config.noise == "constant":
                load_TE = chance_above_kth(*values, self.k)
            else:
                load_TE = chance_above_rivals(*values, own_TK.clamp(min=0).long())
            add_sums(routing, "load_E", load_TE, valid_T)

    def _drop_seconds(self, routing: Routing, router_input: RouterInput) -> None:
        """Take the second expert from tokens that do without, as ``second_expert`` says."""
        rule, threshold = self.config.second_expert, self.config.second_threshold
        if rule == "all" or (rule == "random" and not self.training):
            return
        kept_TK = torch.ones_like(routing.experts_TK, dtype=torch.bool)
        second_T = routing.weights_TK[:, 1].detach()
        if router_input.given_TK is not None:
            kept_TK = router_input.given_TK >= 0
        elif rule == "none":
            kept_TK[:, 1] = False
        elif rule == "threshold":
            kept_TK[:, 1] = second_T > threshold
        else:
            drawn_T = self._draw(router_input, SECOND, torch.rand, second_T)
            kept_TK[:, 1] = drawn_T * threshold < second_T
        drop(routing, kept_TK)
