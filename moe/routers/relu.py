"""The ReLU router (ReMoE, Wang et al. 2024): fully differentiable, with as many experts as fit.

T tokens, D model width, E experts, K the most choices of a token.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from .linear import LearnedConfig, LinearRouter
from .loss_terms import BalanceSums, GlobalCounts, LayerLosses, training_sum
from .router import RouterSizes
from .routing import RouterInput, Routing, count_choices, count_tokens
from .split_rows import choices_of


class ReLU(LearnedConfig):
    """A token visits every expert whose logit is positive, and the logit is the weight (ReMoE).

    An L1 loss on the weights, heavier on busy experts, makes the choices sparse. Its coefficient
    grows by ``factor`` after each step in which tokens visit more than ``k`` experts on average
    over all MoE layers, and shrinks by it otherwise. A token may visit no expert at all. Training
    begins with about half of all experts for each token, so its first steps (about 100 in the
    paper) need more memory and time than later ones.
    """

    paper: ClassVar[str] = "Wang et al. 2024 (ReMoE)"
    varies: ClassVar[bool] = True

    kind: Literal["relu"] = "relu"
    k: int = Field(default=2, ge=1)
    """Mean of a token's experts that the controller aims at."""
    l1: float = Field(default=1e-8, gt=0)
    """First coefficient of the L1 loss."""
    factor: float = Field(default=1.2, ge=1)
    """Change of the coefficient in a step; 1 = none."""

    def build(self, sizes: RouterSizes) -> "ReLURouter":
        """Return the module."""
        return ReLURouter(self, sizes.d_model, sizes.num_experts)

    def architecture(self) -> dict[str, Any]:
        """Return kind and look-ahead: all else steers training only."""
        return self.model_dump(mode="json", include={"kind", "lookahead"})


class ReLURouter(LinearRouter):
    """See :class:`ReLU`. The L1 coefficient is a buffer, saved with the weights."""

    l1: Tensor
    """fp32 scalar: the L1 coefficient of the next step."""

    def __init__(self, config: ReLU, d_model: int, num_experts: int) -> None:
        super().__init__(config, d_model, num_experts)
        self.config: ReLU = config
        self.register_buffer("l1", torch.tensor(config.l1))

    def route(self, router_input: RouterInput) -> Routing:
        """Choose the experts with a positive logit for each row of ``x_TD``.

        Waits for the device, because the most choices of a token depend on the rows.
        """
        x_TD, valid_T = router_input.x_TD, router_input.valid_T
        assert x_TD is not None, "the caller must pass hidden rows"
        weights_TE = self.logits(x_TD).relu()
        if valid_T is not None:
            weights_TE = torch.where(valid_T.unsqueeze(1), weights_TE, 0)
        experts_TK, weights_TK = choices_of(weights_TE > 0, weights_TE)
        routing = Routing(
            experts_TK=experts_TK,
            weights_TK=weights_TK,
            counts_E=count_choices(experts_TK, self.num_experts),
            num_tokens=count_tokens(valid_T, experts_TK),
        )
        if self.training:
            routing.extras["weight_sums_E"] = weights_TE.sum(dim=0)
        return routing

    def losses(self, routing: Routing, counts: GlobalCounts) -> LayerLosses:
        """Return ``l1 * E / (k T^2) * sum_e n_e W_e``.

        n_e are the routed rows and W_e the summed weights of expert e over the global batch.
        """
        sums = BalanceSums(
            num_experts=self.num_experts,
            k=self.k,
            counts_E=counts.counts_E,
            probability_sums_E=training_sum(routing, "weight_sums_E"),
            num_tokens=counts.num_tokens,
        )
        return LayerLosses(terms=(self.l1 * sums.loss(),))

    @torch.no_grad()
    def after_step(self, counts: GlobalCounts, layers: Sequence[GlobalCounts]) -> None:
        """Raise the L1 coefficient if choices are too dense over all layers, else lower it."""
        routed = sum(int(layer.counts_E.sum()) for layer in layers)
        tokens = sum(int(layer.num_tokens) for layer in layers)
        if routed > self.k * tokens:
            self.l1 *= self.config.factor
        else:
            self.l1 /= self.config.factor
