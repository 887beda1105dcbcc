"""BASE layers (Lewis et al. 2021, "BASE Layers: Simplifying Training of Large, Sparse Models").

T tokens, D model width, E experts, K = 1 choices.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Generator, Tensor, nn

from ...kernels.values.choice import where_valid
from .assignment import balanced_assignment
from .groups import valid_rows
from .linear import LearnedConfig, LinearRouter
from .router import RouterSizes
from .routing import RouterInput, Routing, count_choices, count_tokens
from .split_rows import weights_of

GAIN = 0.1
"""Experts' centroids begin orthogonal with this length (fairseq)."""


class Base(LearnedConfig):
    """A balanced assignment of tokens to experts, with the largest sum of affinities (BASE).

    Every expert gets the same number of each sequence's tokens, or one more where it does not
    divide. An affinity is ``x . c_e`` with an expert's centroid c, and the weight of the choice is
    ``sigmoid(x . c_e)``: the paper's ``(1 - a) x + a Expert(x)``, whose expert has a residual
    inside. There is no loss. Training looks at later tokens of the sequence. Evaluation takes the
    expert with the largest affinity, token by token. The assignment is solved on the host: for a
    sequence of 1,000 tokens in 0.1 to 1 s, and for 2,000 in 0.6 s and more.
    """

    paper: ClassVar[str] = "Lewis et al. 2021 (BASE)"

    kind: Literal["base"] = "base"
    k: int = Field(default=1, ge=1, le=1)
    """Experts each token visits: one."""

    def most_rows(self, num_tokens: int, num_experts: int) -> int | None:
        """Return an even share, rounded up."""
        return -(-num_tokens // num_experts)

    def build(self, sizes: RouterSizes) -> "BaseRouter":
        """Return the module."""
        return BaseRouter(self, sizes.d_model, sizes.num_experts)


class BaseRouter(LinearRouter):
    """See :class:`Base`."""

    replays: ClassVar[bool] = True

    def __init__(self, config: Base, d_model: int, num_experts: int) -> None:
        super().__init__(config, d_model, num_experts)
        nn.init.orthogonal_(self.weight, gain=GAIN)

    def initialize(self, name: str, generator: Generator) -> Tensor | None:
        """Return orthogonal centroids of length 0.1."""
        weight_ED = torch.empty(self.weight.shape, device="cpu")
        return nn.init.orthogonal_(weight_ED, gain=GAIN, generator=generator)

    def route(self, router_input: RouterInput) -> Routing:
        """Assign the rows of each sequence; in evaluation take the best expert of each row."""
        x_TD, valid_T = router_input.x_TD, router_input.valid_T
        assert x_TD is not None, "the caller must pass hidden rows"
        affinity_TE = self.logits(x_TD)
        experts_TK = router_input.given_TK
        if experts_TK is None:
            experts_TK = self._assign(affinity_TE, router_input).unsqueeze(1).int()
        experts_TK = where_valid(valid_T, experts_TK)
        return Routing(
            experts_TK=experts_TK,
            weights_TK=weights_of(experts_TK, affinity_TE.sigmoid()),
            counts_E=count_choices(experts_TK, self.num_experts),
            num_tokens=count_tokens(valid_T, experts_TK),
        )

    def _assign(self, affinity_TE: Tensor, router_input: RouterInput) -> Tensor:
        """Return each row's expert, int64 ``[T]``."""
        if not self.training:
            return affinity_TE.argmax(dim=1)
        expert_T = torch.full((len(affinity_TE),), -1, device=affinity_TE.device)
        for rows in valid_rows(router_input, len(affinity_TE), affinity_TE.device):
            expert_T[rows] = balanced_assignment(affinity_TE[rows])
        return expert_T
