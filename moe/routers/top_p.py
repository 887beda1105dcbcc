"""The top-p router (Huang et al. 2024): unsure tokens visit more experts.

T tokens, D model width, E experts, K columns of choices.
"""

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ...kernels.values.choice import ChoiceRule, loss_sums, where_valid
from .entropy import add_entropy, mean_entropy
from .linear import LearnedConfig, LinearRouter
from .loss_terms import GlobalCounts, LayerLosses, balance_and_z
from .router import RouterSizes
from .routing import RouterInput, Routing, count_choices, count_tokens
from .split_rows import weights_of

SOFTMAX = ChoiceRule(k=1)
FIRST_LOOK = 8
"""On a CPU the best experts are sorted first, and all only if these do not exceed p for some row:
a full sort takes five times as long."""


class TopP(LearnedConfig):
    """A token visits its most probable experts until their probabilities exceed p together.

    Huang et al. 2024, "Harder Tasks Need More Experts". Weights are the probabilities themselves.
    ``k`` is the expected mean: it divides the balance loss, and is the width of lines of choices.
    """

    paper: ClassVar[str] = "Huang et al. 2024"
    varies: ClassVar[bool] = True

    kind: Literal["top_p"] = "top_p"
    p: float = Field(default=0.4, ge=0, le=1)
    """A token's experts are the fewest whose probabilities add up to more than this. 0 is top-1."""
    max_k: int | None = Field(default=None, ge=1)
    """Most experts of a token; null = all."""
    entropy_loss: float = Field(default=1e-4, ge=0)
    """Coefficient of the mean entropy of a token's probabilities, the paper's dynamic loss. Without
    it tokens become unsure and visit many experts."""
    balance_loss: float = Field(default=0.01, ge=0)
    """Coefficient of the Switch balance loss, with all choices counted and divided by k."""
    z_loss: float = Field(default=0.0, ge=0)
    """Coefficient of the ST-MoE z-loss."""

    def build(self, sizes: RouterSizes) -> "TopPRouter":
        """Return the module."""
        return TopPRouter(self, sizes.d_model, sizes.num_experts)

    def architecture(self) -> dict[str, Any]:
        """Return all but the coefficients of losses."""
        return self.model_dump(mode="json", exclude={"entropy_loss", "balance_loss", "z_loss"})


class TopPRouter(LinearRouter):
    """See :class:`TopP`."""

    replays: ClassVar[bool] = True

    def __init__(self, config: TopP, d_model: int, num_experts: int) -> None:
        super().__init__(config, d_model, num_experts)
        self.config: TopP = config

    def route(self, router_input: RouterInput) -> Routing:
        """Choose experts of each row of ``x_TD``, best first. Does not wait for a GPU."""
        x_TD, valid_T = router_input.x_TD, router_input.valid_T
        assert x_TD is not None, "the caller must pass hidden rows"
        logits_TE = self.logits(x_TD)
        probabilities_TE = logits_TE.softmax(dim=-1)
        experts_TK = router_input.given_TK
        if experts_TK is None:
            experts_TK = self._choose(probabilities_TE.detach())
        experts_TK = where_valid(valid_T, experts_TK)
        routing = Routing(
            experts_TK=experts_TK,
            weights_TK=weights_of(experts_TK, probabilities_TE),
            counts_E=count_choices(experts_TK, self.num_experts),
            num_tokens=count_tokens(valid_T, experts_TK),
        )
        if self.training:
            self._add_sums(routing, logits_TE, probabilities_TE, valid_T)
        return routing

    def _choose(self, probabilities_TE: Tensor) -> Tensor:
        """Return the experts of each row, best first: int32 ``[T, K]``, -1 = none."""
        most = self.config.max_k or self.num_experts
        may_look = probabilities_TE.device.type == "cpu" and not torch.compiler.is_compiling()
        width = min(FIRST_LOOK, most) if may_look else most
        ids_TK = _best(probabilities_TE, width)
        sums_TK = probabilities_TE.gather(1, ids_TK).cumsum(dim=1)
        if width < most and not bool((sums_TK[:, -1] > self.config.p).all()):
            ids_TK = _best(probabilities_TE, most)
            sums_TK = probabilities_TE.gather(1, ids_TK).cumsum(dim=1)
        # Before the first expert there is 0, so it is always chosen.
        before_TK = F.pad(sums_TK[:, :-1], (1, 0))
        return torch.where(before_TK <= self.config.p, ids_TK, -1).int()

    def losses(self, routing: Routing, counts: GlobalCounts) -> LayerLosses:
        """Return balance, z and the mean entropy."""
        config = self.config
        found = balance_and_z(routing, counts, self.k, config.balance_loss, config.z_loss)
        entropy = config.entropy_loss * mean_entropy(routing, counts)
        return found._replace(terms=(*found.terms, entropy))

    def _add_sums(
        self,
        routing: Routing,
        logits_TE: Tensor,
        probabilities_TE: Tensor,
        valid_T: Tensor | None,
    ) -> None:
        """Store what the losses need of this rank."""
        sums = loss_sums(logits_TE, probabilities_TE, valid_T, SOFTMAX)
        routing.extras = sums._asdict()
        add_entropy(routing, logits_TE, valid_T, SOFTMAX)


def _best(probabilities_TE: Tensor, count: int) -> Tensor:
    """Return the ids of each row's ``count`` most probable experts; ties go to the lower id."""
    num_experts = probabilities_TE.shape[1]
    if probabilities_TE.dtype != torch.float32:
        order_TE = probabilities_TE.sort(dim=1, descending=True, stable=True).indices
        return order_TE[:, :count]
    # The bits of positive floats have the floats' order. With the id in the lower digits no two
    # keys are equal, so topk, which is faster than a stable sort, has one result only.
    last_E = torch.arange(num_experts - 1, -1, -1, device=probabilities_TE.device)
    keys_TE = probabilities_TE.view(torch.int32).long() * num_experts + last_E
    return keys_TE.topk(count, dim=1).indices
