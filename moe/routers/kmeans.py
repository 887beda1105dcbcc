"""Routers by distance to centroids: fixed ones (Moirai-MoE), or means that follow the tokens.

T tokens, D model width, E experts, K choices.
"""

import zlib
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ...kernels.router import choose
from ...kernels.values.choice import ChoiceRule
from .kmeans_update import moved, reseed, sums_of_members, sums_to_means
from .linear import LearnedConfig, project
from .loss_terms import BalanceSums, GlobalCounts, LayerLosses, training_sum
from .router import Router, RouterSizes
from .routing import RouterInput, Routing, count_choices, count_tokens

TRAINING_ONLY = ("update_rate", "reseed_after", "seed", "balance_loss", "commitment_loss")


class KMeans(LearnedConfig):
    """Tokens go to the experts with the nearest centroids (Moirai-MoE, Liu et al. 2024).

    Weights are a softmax over the k chosen distances, so experts' gradients reach the hidden rows.
    Centroids are a buffer without gradient. They begin at random. ``moeyard cluster`` writes a
    trained model with those of its own rows. Or set ``gate.centroids_ED``, for example by
    ``moeyard.moe.routers.kmeans_fit.fit_centroids``, or let ``update_rate`` move them.
    """

    paper: ClassVar[str] = "Liu et al. 2024 (Moirai-MoE); Roy et al. 2021 (online)"
    learns: ClassVar[bool] = False

    kind: Literal["kmeans"] = "kmeans"
    choose: Literal["nearest", "farthest"] = "nearest"
    """nearest: the smallest Euclidean distances, as the paper says. farthest: the largest, as the
    released code and so its checkpoints do."""
    temperature: float = Field(default=1.0, gt=0)
    """Distances are divided by this before the softmax."""
    update_rate: float = Field(default=0.0, ge=0, le=1)
    """After each step a centroid moves by this part of the way to the mean of the tokens that it is
    nearest to, over the global batch (online k-means, Roy et al. 2021: 0.001). A centroid without
    tokens stays. 0 = fixed. Ranks exchange D numbers for each expert."""
    reseed_after: int = Field(default=0, ge=0)
    """A centroid that was nearest to no token for this many steps takes half of the tokens of the
    busiest one: both move apart from its place. 0 = never."""
    seed: int = 0
    """Seed of the first centroids."""
    balance_loss: float = Field(default=0.01, ge=0)
    """Coefficient of the Switch balance loss on the softmax over all distances. It moves the hidden
    rows, because centroids have no gradient."""
    commitment_loss: float = Field(default=0.0, ge=0)
    """Coefficient of the mean squared difference between a token and its nearest centroid (Roy et
    al. 2021: 1e-4)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.choose == "farthest" and (self.update_rate or self.commitment_loss):
            raise ValueError(
                "choose is farthest, where centroids cannot follow the tokens that choose them; "
                "set update_rate and commitment_loss to 0, or use nearest."
            )
        if self.reseed_after and not self.update_rate:
            raise ValueError(
                f"reseed_after is {self.reseed_after}, but update_rate is 0, so centroids do not "
                "move; set update_rate, or leave reseed_after out."
            )
        return self

    def build(self, sizes: RouterSizes) -> "KMeansRouter":
        """Return the module."""
        return KMeansRouter(self, sizes.d_model, sizes.num_experts, sizes.layer)

    def architecture(self) -> dict[str, Any]:
        """Return what the meaning of centroids depends on."""
        values = super().architecture()
        for name in TRAINING_ONLY:
            del values[name]
        return values


class KMeansRouter(Router):
    """See :class:`KMeans`."""

    replays: ClassVar[bool] = True

    centroids_ED: Tensor
    idle_steps_E: Tensor
    """int64: steps since a token was nearest to each centroid; counted with ``update_rate``."""

    def __init__(self, config: KMeans, d_model: int, num_experts: int, layer: int = 0) -> None:
        super().__init__(config, num_experts)
        self.config: KMeans = config
        self.rule = ChoiceRule(k=config.k)
        # Rows behind an RMSNorm have the length of these.
        seed = zlib.crc32(f"kmeans/{config.seed}/{layer}".encode())
        generator = torch.Generator("cpu").manual_seed(seed)
        centroids_ED = torch.randn(num_experts, d_model, generator=generator, device="cpu")
        self.register_buffer("centroids_ED", centroids_ED)
        self.register_buffer("idle_steps_E", torch.zeros(num_experts, dtype=torch.int64))

    def route(self, router_input: RouterInput) -> Routing:
        """Choose the k nearest or farthest centroids of each row.

        In a replay centroids still follow the tokens that are nearest to them.
        """
        x_TD, valid_T = router_input.x_TD, router_input.valid_T
        assert x_TD is not None, "the caller must pass hidden rows"
        squared_TE = self.squared_distances(x_TD)
        # The slope of a square root is infinite at 0.
        distance_TE = squared_TE.clamp(min=torch.finfo(squared_TE.dtype).tiny).sqrt()
        sign = -1 if self.config.choose == "nearest" else 1
        logits_TE = sign * distance_TE / self.config.temperature
        choices = choose(
            logits_TE, None, valid_T, self.rule, self.training, given_TK=router_input.given_TK
        )
        routing = Routing(
            experts_TK=choices.experts_TK,
            weights_TK=choices.weights_TK,
            counts_E=choices.counts_E,
            num_tokens=count_tokens(valid_T, choices.experts_TK),
        )
        if choices.sums is not None:
            routing.extras["probability_sums_E"] = choices.sums.probability_sums_E
            self._add_members(routing, x_TD, squared_TE, valid_T)
        return routing

    def squared_distances(self, x_TD: Tensor) -> Tensor:
        """Return ``|x - c|^2`` in fp32 or fp64, ``[T, E]``; 0 where rounding makes it negative."""
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        x_TD, centroids_ED = x_TD.to(dtype), self.centroids_ED.to(dtype)
        norms_T1 = x_TD.square().sum(dim=1, keepdim=True)
        products_TE = project(x_TD, centroids_ED)
        return (norms_T1 - 2 * products_TE + centroids_ED.square().sum(dim=1)).clamp(min=0)

    def _add_members(
        self, routing: Routing, x_TD: Tensor, squared_TE: Tensor, valid_T: Tensor | None
    ) -> None:
        """Store what updates and the commitment loss need of the tokens nearest to a centroid."""
        config = self.config
        if not config.update_rate and not config.commitment_loss:
            return
        closest_T, nearest_T = squared_TE.min(dim=1)
        if valid_T is not None:
            closest_T = torch.where(valid_T, closest_T, 0)
            nearest_T = torch.where(valid_T, nearest_T, -1)
        if config.commitment_loss:
            routing.extras["commitment_sum"] = closest_T.sum() / x_TD.shape[1]
        if config.update_rate:
            routing.extra_counts["members_E"] = count_choices(nearest_T, self.num_experts)
            routing.extra_counts["sums_ED"] = sums_of_members(x_TD, nearest_T, self.num_experts)

    def losses(self, routing: Routing, counts: GlobalCounts) -> LayerLosses:
        """Return this rank's share of balance and commitment."""
        sums_E = training_sum(routing, "probability_sums_E")
        shares = BalanceSums(self.num_experts, self.k, counts.counts_E, sums_E, counts.num_tokens)
        balance = shares.loss()
        terms = [self.config.balance_loss * balance]
        if "commitment_sum" in routing.extras:
            mean = routing.extras["commitment_sum"] / counts.num_tokens.clamp(min=1)
            terms.append(self.config.commitment_loss * mean)
        return LayerLosses(tuple(terms), balance=balance)

    @torch.no_grad()
    def after_step(self, counts: GlobalCounts, layers: Sequence[GlobalCounts]) -> None:
        """Move the centroids; see :class:`KMeans`."""
        config, centroids_ED = self.config, self.centroids_ED
        if not config.update_rate:
            return
        members_E = counts.extra["members_E"].to(centroids_ED.device)
        means_ED = sums_to_means(counts.extra["sums_ED"].to(centroids_ED.device), members_E)
        centroids_ED.copy_(moved(centroids_ED, means_ED, members_E, config.update_rate))
        self.idle_steps_E.add_(1).masked_fill_(members_E > 0, 0)
        if config.reseed_after:
            reseed(centroids_ED, self.idle_steps_E, members_E, config.reseed_after)
