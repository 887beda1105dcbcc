"""Permutation-based local search around any router (COMET+, Ibrahim et al. 2023, section 4).

T tokens, E experts.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Generator, Tensor, nn

from .around import AroundRouter
from .assignment import best_assignment, sinkhorn
from .linear import Stepped
from .loss_terms import GlobalCounts, LayerLosses
from .nested import inner_counts, inner_routing, keep_inner
from .router import Router, RouterConfig, RouterSizes
from .routing import RouterInput, Routing, count_choices
from .smooth_step import entropy, uniform
from .split_rows import choices_of, renamed
from .topk import TopK

if TYPE_CHECKING:
    SearchedRouter = RouterConfig
# Otherwise table.py fills the name in, because it knows all routers.

BOUND = 0.05
"""The matrix begins in U(-0.05, 0.05), as in the released code."""


class LocalSearch(AroundRouter):
    """Another router, together with a search for the best order of its experts (COMET+).

    A gate with structure, such as a tree or a hash table, treats some experts as neighbours. Which
    expert sits where is learned: in the first ``search_steps`` steps the weights ``G`` of the inner
    router become ``G P``. P is a soft permutation: Sinkhorn's algorithm on ``exp(L / temperature)``
    with a learned matrix L. Then P becomes the nearest permutation and stays fixed. Evaluation
    takes the nearest permutation from the start. During the search a soft P gives every expert a
    weight, so that training is dense and costs E/k times as much; it also keeps all Sinkhorn
    iterations for the backward.
    """

    paper: ClassVar[str] = "Ibrahim et al. 2023 (COMET+)"
    varies: ClassVar[bool] = True

    kind: Literal["local_search"] = "local_search"
    k: int = Field(default=2, ge=1)
    """Experts each token visits: that of the inner router."""
    router: "SearchedRouter" = TopK()
    """The inner router: a section with its own ``kind`` and fields."""
    search_steps: int = Field(default=1000, ge=1)
    """Steps of training in which the order is learned (the paper: the first 1 to 10 epochs)."""
    first_temperature: float = Field(default=1e-3, gt=0)
    """Temperature of the first step. Its logarithm falls linearly."""
    last_temperature: float = Field(default=1e-7, gt=0)
    """Temperature of the last step of the search."""
    first_iterations: int = Field(default=20, ge=1)
    """Sinkhorn iterations of the first step. They grow linearly."""
    last_iterations: int = Field(default=150, ge=1)
    """Sinkhorn iterations of the last step of the search."""
    entropy_loss: float = Field(default=1e-4, ge=0)
    """Coefficient of the entropy of P's rows, during the search."""

    @model_validator(mode="after")
    def _take_k(self) -> Self:
        if self.router.reads_gates:
            raise ValueError(
                f"router.kind is {self.router.kind}, whose scores belong to the experts that they "
                "are made from, so there is no order to search; use another router."
            )
        if "k" in self.model_fields_set and self.k != self.router.k:
            raise ValueError(
                f"k is {self.k}, but that of the inner router is {self.router.k}; remove k, or set "
                "router.k."
            )
        self.__dict__["k"] = self.router.k  # frozen for users; here it is still being made
        return self

    def build(self, sizes: RouterSizes) -> "LocalSearchRouter":
        """Return the module."""
        return LocalSearchRouter(self, sizes)

    def pools_layers(self) -> bool:
        """Return what the inner router says."""
        return self.router.pools_layers()

    def architecture(self) -> dict[str, Any]:
        """Return that of the inner router, and that its experts have another order."""
        return {"kind": self.kind, "router": self.router.architecture()}

    def most_rows(self, num_tokens: int, num_experts: int) -> int | None:
        """Return None: during the search every row visits every expert."""
        return None

    def problem_with_tensor(self, name: str, tensor: Tensor, num_experts: int) -> str | None:
        """Return what is wrong with the order, or what the inner router says."""
        if name.startswith("router."):
            return self.router.problem_with_tensor(name[len("router.") :], tensor, num_experts)
        if name == "order_E" and sorted(tensor.tolist()) != list(range(num_experts)):
            return (
                f"is {tensor.tolist()}, which is not an order of {num_experts} experts; the "
                "weights belong to another configuration"
            )
        return None


class LocalSearchRouter(Stepped, Router):
    """See :class:`LocalSearch`."""

    replays: ClassVar[bool] = True
    order_E: Tensor
    """int64: the expert that each choice of the inner router means once P is a permutation."""

    def __init__(self, config: LocalSearch, sizes: RouterSizes) -> None:
        super().__init__(config, sizes.num_experts)
        self.config: LocalSearch = config
        self.router: Router = config.router.build(sizes)
        self.permutation_weight = nn.Parameter(torch.zeros(self.num_experts, self.num_experts))
        self.register_buffer("order_E", torch.arange(self.num_experts))
        self.start_steps()
        if not self.permutation_weight.is_meta:
            generator = torch.Generator().manual_seed(sizes.layer)
            self.permutation_weight.data.copy_(self._first_matrix(generator))

    def initialize(self, name: str, generator: Generator) -> Tensor | None:
        """Return a matrix in U(-0.05, 0.05), or what the inner router says of its own."""
        if name.startswith("router."):
            return self.router.initialize(name.removeprefix("router."), generator)
        return self._first_matrix(generator)

    def _first_matrix(self, generator: Generator) -> Tensor:
        """Draw a matrix; then order its columns so that its nearest permutation is ``order_E``.

        In the beginning all experts are alike, so their names may be exchanged.
        """
        matrix_EE = uniform(self.permutation_weight.shape, BOUND, generator)
        return matrix_EE[:, best_assignment(self._soften(matrix_EE, 0))]

    def _soften(self, matrix_EE: Tensor, step: int) -> Tensor:
        """Return the soft permutation of ``matrix_EE`` at ``step`` of the search, in fp64."""
        config = self.config
        done = step / max(1, config.search_steps - 1)
        fall = config.last_temperature / config.first_temperature
        temperature = config.first_temperature * fall**done
        growth = config.last_iterations - config.first_iterations
        iterations = config.first_iterations + round(growth * done)
        return sinkhorn(matrix_EE.double() / temperature, iterations)

    def route(self, router_input: RouterInput) -> Routing:
        """Let the inner router choose; mix or exchange its experts."""
        if router_input.given_TK is not None:
            inner_TK = renamed(router_input.given_TK, self.order_E.argsort())
            router_input = replace(router_input, given_TK=inner_TK)
        inner = self.router.route(router_input)
        if self._searches():
            soft_EE = self._soften(self.permutation_weight, int(self.step))
            routing = self._mixed(inner, soft_EE)
            rows = entropy(soft_EE) + entropy(soft_EE / soft_EE.sum(dim=1, keepdim=True))
            routing.extras["permutation_entropy"] = rows.mean()
        else:
            routing = self._exchanged(inner)
        if self.training:
            keep_inner(routing, inner)
        return routing

    def why_no_replay(self) -> str | None:
        """Return that the search is not over, or what the inner router says."""
        if not self._searches():
            return self.router.why_no_replay()
        return (
            f"router.search_steps is {self.config.search_steps} and {int(self.step)} are done, but "
            "during the search routers cannot replay recorded routes; replay later steps."
        )

    def _searches(self) -> bool:
        return self.training and int(self.step) < self.config.search_steps

    def _mixed(self, inner: Routing, soft_EE: Tensor) -> Routing:
        """Return the routing with weights ``G P``."""
        present_TK = inner.experts_TK >= 0
        # A hash router's weights are in fp32 whatever the precision.
        dtype = torch.promote_types(inner.weights_TK.dtype, self.permutation_weight.dtype)
        given_TK = torch.where(present_TK, inner.weights_TK, 0).to(dtype)
        weights_TE = given_TK.new_zeros(len(given_TK), self.num_experts).scatter_add(
            1, inner.experts_TK.clamp(min=0).long(), given_TK
        )
        with torch.autocast(weights_TE.device.type, enabled=False):
            weights_TE = weights_TE @ soft_EE.to(dtype)
        experts_TK, weights_TK = choices_of(weights_TE.detach() != 0, weights_TE)
        counts_E = count_choices(experts_TK, self.num_experts)
        return Routing(experts_TK, weights_TK, counts_E, inner.num_tokens)

    def _exchanged(self, inner: Routing) -> Routing:
        """Return the routing with each expert replaced by that of ``order_E``."""
        experts_TK = renamed(inner.experts_TK, self.order_E)
        order_E = self.order_E.to(inner.counts_E.device)
        counts_E = torch.zeros_like(inner.counts_E).index_copy(0, order_E, inner.counts_E)
        return Routing(experts_TK, inner.weights_TK, counts_E, inner.num_tokens)

    def losses(self, routing: Routing, counts: GlobalCounts) -> LayerLosses:
        """Return the inner router's losses, and the entropy of P's rows during the search.

        The entropy is the mean over rows of ``sum -p log(p + 1e-6)``, plus the same after the rows
        are divided by their sums (the released code has both).
        """
        found = self.router.losses(inner_routing(routing), inner_counts(counts))
        soft = routing.extras.get("permutation_entropy")
        if soft is None:
            # The matrix has no use any more, but DDP waits for a gradient of all parameters.
            term = 0 * self.permutation_weight.sum()
        else:
            part = routing.num_tokens / counts.num_tokens.clamp(min=1)
            term = (self.config.entropy_loss * part * soft).to(routing.weights_TK.dtype)
        return found._replace(terms=(*found.terms, term))

    def dropped(self, counts: GlobalCounts) -> int:
        """Return the inner router's dropped choices."""
        return self.router.dropped(inner_counts(counts))

    @torch.no_grad()
    def after_step(self, counts: GlobalCounts, layers: Sequence[GlobalCounts]) -> None:
        """Tell the inner router; find the permutation that is nearest to P."""
        self.router.after_step(inner_counts(counts), [inner_counts(layer) for layer in layers])
        if self.step < self.config.search_steps:
            soft_EE = self._soften(self.permutation_weight, int(self.step))
            self.order_E.copy_(best_assignment(soft_EE))
        super().after_step(counts, layers)
