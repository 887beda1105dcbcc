"""A user's router, as docs/own-routers.md shows it: X-MoE's cosine router.

T tokens, D model width, P width of the comparison, E experts, K choices.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import moeyard


class Cosine(moeyard.RouterConfig):
    """Tokens choose the experts whose directions are nearest to theirs (Chi et al. 2022)."""

    width: int = 4
    confidence_loss: float = 0.0

    def build(self, sizes: moeyard.RouterSizes) -> "CosineRouter":
        return CosineRouter(self, sizes)

    def architecture(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude={"confidence_loss"})


class CosineRouter(moeyard.Router):
    """A projection, a direction for each expert, a temperature, and a bias that evens the load."""

    def __init__(self, config: Cosine, sizes: moeyard.RouterSizes) -> None:
        super().__init__(config, sizes.num_experts)
        self.project = nn.Linear(sizes.d_model, config.width, bias=False)
        self.directions_EP = nn.Parameter(torch.randn(sizes.num_experts, config.width))
        self.temperature = nn.Parameter(torch.ones(()))
        self.register_buffer("balance_E", torch.zeros(sizes.num_experts))

    def route(self, router_input: moeyard.RouterInput) -> moeyard.Routing:
        x_TD = router_input.x_TD.to(self.directions_EP.dtype)
        with torch.autocast(x_TD.device.type, enabled=False):
            places_TP = F.normalize(self.project(x_TD), dim=-1)
            cosines_TE = places_TP @ F.normalize(self.directions_EP, dim=-1).T
            scores_TE = (cosines_TE / self.temperature).softmax(dim=-1)
        experts_TK = (scores_TE.detach() + self.balance_E).topk(self.k, dim=-1).indices
        routing = moeyard.Routing(
            experts_TK=experts_TK.int(),
            weights_TK=scores_TE.gather(-1, experts_TK),
            counts_E=torch.bincount(experts_TK.flatten(), minlength=self.num_experts),
            num_tokens=torch.tensor(len(x_TD)),
        )
        if self.training:
            largest_T = scores_TE.max(dim=-1).values
            routing.extras["confidence_sum"] = largest_T.sum()
            routing.extra_counts["confident"] = (largest_T > 0.3).sum()
        return routing

    def losses(self, routing: moeyard.Routing, counts: moeyard.GlobalCounts) -> moeyard.LayerLosses:
        mean = routing.extras["confidence_sum"] / counts.extra["confident"].clamp(min=1)
        return moeyard.LayerLosses(terms=(self.config.confidence_loss * mean,))

    @torch.no_grad()
    def after_step(
        self, counts: moeyard.GlobalCounts, layers: Sequence[moeyard.GlobalCounts]
    ) -> None:
        load_E = counts.counts_E.to(self.balance_E)
        self.balance_E += 0.01 * (load_E.mean() - load_E).sign()
