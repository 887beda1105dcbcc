"""Null experts: a choice of one computes nothing, so easy tokens cost less (AdaMoE; MoE++).

T tokens, D model width, E experts, X = E and the null experts behind them, K choices.
"""

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ...kernels.router import choose
from ...kernels.values.choice import EPSILON, ChoiceRule, scores
from .given import fill_places
from .linear import LearnedConfig, LinearRouter
from .loss_terms import GlobalCounts, LayerLosses, training_sum
from .router import RouterSizes
from .routing import RouterInput, Routing, count_tokens


class NullExperts(LearnedConfig):
    """The k best of E experts and some null experts, whose output is 0 (AdaMoE; MoE++).

    A token's number of experts is k less the null experts among its choices. With null experts
    alone, the token skips the layer: only the residual (and a shared expert) is left.
    ``routing.extra_counts["null"]`` counts visits of null experts.
    """

    paper: ClassVar[str] = "Zeng et al. 2024 (AdaMoE); Jin et al. 2024 (MoE++)"
    varies: ClassVar[bool] = True

    kind: Literal["null_experts"] = "null_experts"
    k: int = Field(default=2, ge=1)
    """Choices of each token, null experts among them."""
    num_null: int = Field(default=2, ge=1, le=65536)
    """Null experts. They differ in their rows of the router only; with as many as experts, about
    half of the choices compute nothing."""
    renormalize_over: Literal["experts", "all"] = "experts"
    """experts: weights are divided by the sum over chosen experts (AdaMoE, MoE++), so a single
    expert weighs 1. all: by the sum over all choices, so null experts keep their share and the
    output is smaller (Mixtral's order)."""
    balance_loss: float = Field(default=0.01, ge=0)
    """Coefficient of the Switch balance loss over all E + num_null experts, where every null expert
    counts with the mean load of all of them (AdaMoE). 1 is perfect balance."""
    null_factor: float = Field(default=1.0, ge=0)
    """Factor on null experts in that loss. Below 1, more choices go to them (MoE++: 0.75)."""

    def build(self, sizes: RouterSizes) -> "NullExpertsRouter":
        """Return the module."""
        return NullExpertsRouter(self, sizes.d_model, sizes.num_experts)

    def architecture(self) -> dict[str, Any]:
        """Return all but the loss."""
        values = super().architecture()
        del values["balance_loss"], values["null_factor"]
        return values


class NullExpertsRouter(LinearRouter):
    """See :class:`NullExperts`. The weight is ``[X, D]``; its last rows are the null experts'.

    A recording has -1 for a null expert. A replay takes a token's best null experts for them, as
    the choice does.
    """

    replays: ClassVar[bool] = True

    def __init__(self, config: NullExperts, d_model: int, num_experts: int) -> None:
        super().__init__(config, d_model, num_experts, num_scores=num_experts + config.num_null)
        self.config: NullExperts = config
        self.rule = ChoiceRule(k=config.k, renormalize=config.renormalize_over == "all")

    def route(self, router_input: RouterInput) -> Routing:
        """Choose among experts and null experts; -1 stands for the latter."""
        x_TD, valid_T = router_input.x_TD, router_input.valid_T
        assert x_TD is not None, "the caller must pass hidden rows"
        logits_TX = self.logits(x_TD)
        given_TK = router_input.given_TK
        if given_TK is not None:
            given_TK = self._with_null(given_TK, scores(logits_TX.detach(), self.rule))
        choices = choose(logits_TX, None, valid_T, self.rule, self.training, given_TK=given_TK)
        is_expert_TK = choices.experts_TK < self.num_experts
        weights_TK = torch.where(is_expert_TK, choices.weights_TK, 0)
        if self.config.renormalize_over == "experts":
            weights_TK = weights_TK / (weights_TK.sum(dim=1, keepdim=True) + EPSILON)
        counts_E, null_counts_N = choices.counts_E.tensor_split([self.num_experts])
        routing = Routing(
            experts_TK=torch.where(is_expert_TK, choices.experts_TK, -1),
            weights_TK=weights_TK,
            counts_E=counts_E,
            num_tokens=count_tokens(valid_T, choices.experts_TK),
            extra_counts={"null": null_counts_N.sum()},
        )
        if choices.sums is not None:
            routing.extras["probability_sums_X"] = choices.sums.probability_sums_E
        return routing

    def _with_null(self, given_TK: Tensor, scores_TX: Tensor) -> Tensor:
        """Return recorded choices with a token's best null experts in place of -1."""
        null_TN = scores_TX[:, self.num_experts :]
        best_TC = null_TN.topk(min(self.k, self.config.num_null), dim=1).indices
        places_TK = F.pad(given_TK, (0, max(0, self.k - given_TK.shape[1])), value=-1)
        return fill_places(places_TK, best_TC + self.num_experts, self.k)

    def losses(self, routing: Routing, counts: GlobalCounts) -> LayerLosses:
        """Return this rank's share of ``X / (K T^2) * sum_x n_x P_x``; see :class:`NullExperts`."""
        sums_X = training_sum(routing, "probability_sums_X")
        divisor = counts.num_tokens.clamp(min=1).double().square() * self.k
        balance = (self._loads(counts) * (len(sums_X) / divisor) * sums_X).sum().to(sums_X.dtype)
        return LayerLosses((self.config.balance_loss * balance,), balance=balance)

    def _loads(self, counts: GlobalCounts) -> Tensor:
        """Return fp64 ``[X]``: routed rows, in the mean of a null expert and times its factor."""
        num_null = self.config.num_null
        null = counts.extra["null"].double() / num_null * self.config.null_factor
        return torch.cat((counts.counts_E.double(), null.expand(num_null)))
