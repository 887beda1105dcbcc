"""Top-k of a balanced plan (S-BASE, Clark et al. 2022; Megatron's ``sinkhorn`` load balancing).

T tokens, D model width, E experts, K choices.
"""

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ...kernels.router import choose
from ...kernels.values.choice import ChoiceRule
from .groups import valid_rows
from .linear import LearnedConfig, LinearRouter
from .router import RouterSizes
from .routing import RouterInput, Routing, count_choices, count_tokens

TINY = 1e-8
"""Keeps divisions finite (Megatron)."""


class Sinkhorn(LearnedConfig):
    """Experts are the k largest of a plan that is nearly balanced (S-BASE; Megatron).

    In each sequence Sinkhorn's algorithm scales rows and columns of ``exp(z)`` until all tokens,
    and all experts, have the same share. The k largest of a row are its experts. There is no loss
    and no capacity: the load is nearly even. Weights are ``sigmoid(z)`` of the choice with
    ``k: 1``, else ``softmax(z)``, not divided by their sum. Training looks at later tokens of the
    sequence. Evaluation takes the k largest of z, token by token.
    """

    paper: ClassVar[str] = "Clark et al. 2022 (S-BASE); Megatron-LM"

    kind: Literal["sinkhorn"] = "sinkhorn"
    k: int = Field(default=1, ge=1)
    """Experts each token visits."""
    tolerance: float = Field(default=1e-4, gt=0)
    """Iterate until the mean change of the experts' scales is at most this."""
    iterations: int = Field(default=100, ge=1)
    """Iterate at most this often."""

    def build(self, sizes: RouterSizes) -> "SinkhornRouter":
        """Return the module."""
        return SinkhornRouter(self, sizes.d_model, sizes.num_experts)

    def architecture(self) -> dict[str, Any]:
        """Return all but how exactly training balances."""
        values = super().architecture()
        del values["tolerance"], values["iterations"]
        return values


class SinkhornRouter(LinearRouter):
    """See :class:`Sinkhorn`."""

    replays: ClassVar[bool] = True

    def __init__(self, config: Sinkhorn, d_model: int, num_experts: int) -> None:
        super().__init__(config, d_model, num_experts)
        self.config: Sinkhorn = config
        score: Literal["softmax", "sigmoid"] = "sigmoid" if config.k == 1 else "softmax"
        self.rule = ChoiceRule(k=config.k, score=score, renormalize=False)

    def route(self, router_input: RouterInput) -> Routing:
        """Choose by each sequence's plan; in evaluation by the scores themselves."""
        x_TD, valid_T = router_input.x_TD, router_input.valid_T
        assert x_TD is not None, "the caller must pass hidden rows"
        logits_TE = self.logits(x_TD)
        given_TK = router_input.given_TK
        if not self.training or given_TK is not None:
            choices = choose(logits_TE, None, valid_T, self.rule, False, given_TK=given_TK)
            experts_TK, weights_TK = choices.experts_TK, choices.weights_TK
        else:
            experts_TK, weights_TK = self._balanced(logits_TE, router_input)
        return Routing(
            experts_TK=experts_TK,
            weights_TK=weights_TK,
            counts_E=count_choices(experts_TK, self.num_experts),
            num_tokens=count_tokens(valid_T, experts_TK),
        )

    def _balanced(self, logits_TE: Tensor, router_input: RouterInput) -> tuple[Tensor, Tensor]:
        """Return the experts of each sequence's plan, and their weights."""
        experts_TK = torch.full((len(logits_TE), self.k), -1, device=logits_TE.device)
        config = self.config
        for rows in valid_rows(router_input, len(logits_TE), logits_TE.device):
            with torch.autocast(logits_TE.device.type, enabled=False):  # it would choose in bf16
                logits = logits_TE[rows].detach()
                plan_TE = balanced_plan(logits, config.tolerance, config.iterations)
            experts_TK[rows] = plan_TE.topk(self.k, dim=1).indices
        scores_TE = logits_TE.sigmoid() if self.k == 1 else logits_TE.softmax(dim=1)
        return experts_TK.int(), scores_TE.gather(1, experts_TK.clamp(min=0))


def balanced_plan(logits_TE: Tensor, tolerance: float, iterations: int) -> Tensor:
    """Return ``exp(logits)`` with rows and columns scaled to the same sums 1/T and 1/E.

    A row's largest logit is taken off first: the plan does not change, and exp cannot overflow.
    """
    num_rows, num_experts = logits_TE.shape
    cost_TE = (logits_TE - logits_TE.amax(dim=1, keepdim=True)).exp()
    scale_E = cost_TE.new_ones(num_experts)
    for _ in range(iterations):
        before_E = scale_E
        scale_T = 1 / num_rows / (cost_TE @ scale_E + TINY)
        scale_E = 1 / num_experts / (scale_T @ cost_TE + TINY)
        if (scale_E - before_E).abs().mean() <= tolerance:
            break
    return scale_T.unsqueeze(1) * cost_TE * scale_E
