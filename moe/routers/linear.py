"""What learned routers share: where they read, and a linear layer that scores the experts.

T tokens, D model width, E experts.
"""

from collections.abc import Sequence
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.linear import row_stable_linear
from ...kernels.router import project_and_choose
from ...kernels.values.choice import ChoiceRule
from .loss_terms import GlobalCounts
from .router import Router, RouterConfig
from .routing import Lookahead, Routing


class LearnedConfig(RouterConfig):
    """Base of configurations whose router reads hidden rows."""

    lookahead: Literal["ffn_input", "attention_input", "previous_block"] = "ffn_input"
    """What it reads. ``ffn_input``: what the experts read. ``attention_input``: the raw residual
    entering the layer (SmallThinker). ``previous_block``: what the experts of the MoE layer before
    read (Pre-gated MoE); the first MoE layer then reads ``ffn_input``."""

    def reads_at(self) -> Lookahead:
        """Return ``lookahead``."""
        return Lookahead(self.lookahead)

    def for_first_layer(self) -> Self:
        """Return this, but with ``ffn_input`` in place of ``previous_block``."""
        if self.lookahead == "previous_block":
            return self.model_copy(update={"lookahead": "ffn_input"})
        return self


class LinearRouter(Router):
    """Base of routers with one score per expert: ``logits = x @ weight.T``."""

    def __init__(
        self, config: RouterConfig, d_model: int, num_experts: int, num_scores: int | None = None
    ) -> None:
        super().__init__(config, num_experts)
        self.weight = nn.Parameter(torch.empty(num_scores or num_experts, d_model))
        nn.init.normal_(self.weight, std=d_model**-0.5)

    def logits(self, x_TD: Tensor) -> Tensor:
        """Return each row's score for every expert, ``[T, E]``; see :func:`project`."""
        return project(x_TD, self.weight)


def project(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """Return ``x @ weight.T`` in fp32, or in fp64 for fp64 rows.

    Without gradients a row's result does not depend on the other rows.
    """
    dtype = torch.promote_types(x_TD.dtype, torch.float32)
    x_TD, weight_ED = x_TD.to(dtype), weight_ED.to(dtype)
    with torch.autocast(x_TD.device.type, enabled=False):  # it would choose in bf16
        if torch.is_grad_enabled() or dtype != torch.float32:
            return F.linear(x_TD, weight_ED)
        return row_stable_linear(x_TD, weight_ED)


def route_in_one_call(
    x_TD: Tensor,
    weight_ED: Tensor,
    logit_bias_E: Tensor | None,
    bias_E: Tensor | None,
    valid_T: Tensor | None,
    rule: ChoiceRule,
    given_TK: Tensor | None = None,
) -> Routing | None:
    """Route rows in evaluation by one C++ call, to given experts if any; None if it cannot run."""
    if valid_T is not None:
        return None
    found = project_and_choose(x_TD, weight_ED, logit_bias_E, bias_E, rule, given_TK)
    if found is None:
        return None
    return Routing(*found[:3], num_tokens=torch.tensor(x_TD.shape[0]))


class Stepped:
    """Mixin of routers that follow a schedule or draw: a buffer ``step`` counts finished steps.

    Put it before the router's other base. It is saved, so a resumed run goes on where it was.
    """

    step: Tensor

    def start_steps(self) -> None:
        """Register the buffer; call it from ``__init__``."""
        assert isinstance(self, nn.Module)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def after_step(self, counts: GlobalCounts, layers: Sequence[GlobalCounts]) -> None:
        """Count the step."""
        self.step += 1
