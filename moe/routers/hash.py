"""The hash router (Roller et al. 2021, "Hash Layers for Large Sparse Models").

T tokens, K choices, V vocabulary.
"""

import heapq
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ...errors import ConfigError
from .router import Router, RouterConfig, RouterSizes
from .routing import Lookahead, RouterInput, Routing, count_choices, count_tokens


class Hash(RouterConfig):
    """A fixed table from token id to experts (Roller et al. 2021); nothing is learned.

    The layer needs ``vocab_size``, and its forward ``token_ids``.
    """

    kind: Literal["hash"] = "hash"
    k: int = Field(default=1, ge=1)
    """Experts each token visits; each weighs 1/k."""
    table: Literal["random", "balanced"] = "balanced"
    """random: experts drawn per token id. balanced: frequent ids first, each to the experts with
    the least traffic so far; needs token frequencies when training starts."""
    seed: int = 0
    """Seed of the table."""

    paper: ClassVar[str] = "Roller et al. 2021"
    learns: ClassVar[bool] = False
    needs_token_counts: ClassVar[bool] = True

    def build(self, sizes: RouterSizes) -> "HashRouter":
        """Return the module, whose table needs the size of the vocabulary."""
        if sizes.vocab_size is None:
            raise ConfigError("router.kind is hash, which needs a vocabulary; pass vocab_size.")
        return HashRouter(self, sizes.num_experts, sizes.vocab_size, sizes.token_counts)

    def reads_at(self) -> Lookahead:
        """Return that the router reads only token ids."""
        return Lookahead.TOKEN

    def problem_with_tensor(self, name: str, tensor: Tensor, num_experts: int) -> str | None:
        """Return which experts in a table do not exist, or None."""
        if name != "table_VK":
            return None
        lowest, highest = (int(bound) for bound in tensor.aminmax())
        if lowest < 0 or highest >= num_experts:
            return f"names experts from {lowest} to {highest}, but there are {num_experts}"
        return None


class HashRouter(Router):
    """See :class:`Hash`. The table is a buffer, saved and exported with the weights."""

    table_VK: Tensor

    def __init__(
        self,
        config: Hash,
        num_experts: int,
        vocab_size: int,
        token_counts: Sequence[int] | None = None,
    ) -> None:
        super().__init__(config, num_experts)
        if config.table == "random":
            table_VK = random_table(vocab_size, num_experts, config.k, config.seed)
        else:
            counts = [1] * vocab_size if token_counts is None else token_counts
            table_VK = balanced_table(counts, num_experts, config.k)
        self.register_buffer("table_VK", table_VK)

    def route(self, router_input: RouterInput) -> Routing:
        """Look up the experts of each token id."""
        ids_T = router_input.ids_T
        if ids_T is None:
            raise ConfigError(
                "router.kind is hash, which reads token ids; pass token_ids to the layer."
            )
        return self.route_to(router_input, self.table_VK[ids_T])

    def route_to(self, router_input: RouterInput, experts_TK: Tensor) -> Routing:
        """Visit the given experts; each weighs 1/k."""
        valid_T = router_input.valid_T
        if valid_T is not None:
            experts_TK = torch.where(valid_T.unsqueeze(-1), experts_TK, -1)
        return Routing(
            experts_TK=experts_TK,
            weights_TK=torch.full(experts_TK.shape, 1 / self.k, device=experts_TK.device),
            counts_E=count_choices(experts_TK, self.num_experts),
            num_tokens=count_tokens(valid_T, experts_TK),
        )


def random_table(vocab_size: int, num_experts: int, k: int, seed: int) -> Tensor:
    """Draw k distinct experts for every token id: int32 ``[V, K]``."""
    generator = torch.Generator("cpu").manual_seed(seed)
    draws_VE = torch.rand(vocab_size, num_experts, generator=generator, device="cpu")
    return draws_VE.topk(k, dim=-1).indices.int()


def balanced_table(token_counts: Sequence[int], num_experts: int, k: int) -> Tensor:
    """Give each token id, most frequent first, to the k experts with the least traffic so far.

    Ids that never occur count as one occurrence, so that they are spread out too. Ties go to the
    lower id. Returns int32 ``[V, K]``.
    """
    table_VK = torch.empty(len(token_counts), k, dtype=torch.int32, device="cpu")
    heap = [(0, expert) for expert in range(num_experts)]
    by_frequency = sorted(range(len(token_counts)), key=lambda token: (-token_counts[token], token))
    for token in by_frequency:
        lightest = [heapq.heappop(heap) for _ in range(k)]
        table_VK[token] = torch.tensor([expert for _, expert in lightest], device="cpu")
        for load, expert in lightest:
            heapq.heappush(heap, (load + max(1, token_counts[token]), expert))
    return table_VK
