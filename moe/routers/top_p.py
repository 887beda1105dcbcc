"""The top-p router (Huang et al. 2024): unsure tokens visit more experts.

T tokens, D model width, E experts, K the most choices of a token.
"""

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ...kernels.values.choice import ChoiceRule, loss_sums
from .entropy import add_entropy, mean_entropy
from .linear import LearnedConfig, LinearRouter
from .loss_terms import GlobalCounts, LayerLosses, balance_and_z
from .router import RouterSizes
from .routing import RouterInput, Routing, count_choices, count_tokens

SOFTMAX = ChoiceRule(k=1)


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

    def __init__(self, config: TopP, d_model: int, num_experts: int) -> None:
        super().__init__(config, d_model, num_experts)
        self.config: TopP = config

    def route(self, router_input: RouterInput) -> Routing:
        """Choose experts of each row of ``x_TD``, best first. Does not wait for the device."""
        x_TD, valid_T = router_input.x_TD, router_input.valid_T
        assert x_TD is not None, "the caller must pass hidden rows"
        logits_TE = self.logits(x_TD)
        probabilities_TE = logits_TE.softmax(dim=-1)
        weights_TK, ids_TK = probabilities_TE.sort(dim=-1, descending=True, stable=True)
        if self.config.max_k is not None:
            weights_TK, ids_TK = weights_TK[:, : self.config.max_k], ids_TK[:, : self.config.max_k]
        # Before the first expert there is 0, so it is always chosen.
        before_TK = F.pad(weights_TK.detach().cumsum(dim=-1)[:, :-1], (1, 0))
        chosen_TK = before_TK <= self.config.p
        if valid_T is not None:
            chosen_TK = chosen_TK & valid_T.unsqueeze(1)
        experts_TK = torch.where(chosen_TK, ids_TK, -1).int()
        routing = Routing(
            experts_TK=experts_TK,
            weights_TK=torch.where(chosen_TK, weights_TK, 0),
            counts_E=count_choices(experts_TK, self.num_experts),
            num_tokens=count_tokens(valid_T, experts_TK),
        )
        if self.training:
            self._add_sums(routing, logits_TE, probabilities_TE, valid_T)
        return routing

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
