"""The hash router (Roller et al. 2021, "Hash Layers for Large Sparse Models").

T tokens, K choices, V vocabulary, D width of an embedding.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ...errors import ConfigError
from .groups import group_lengths, previous_rows
from .hash_tables import (
    balanced_table,
    clustered_table,
    dispersed_table,
    random_table,
    rows_of_pairs,
    segmented_table,
)
from .router import Router, RouterConfig, RouterSizes
from .routing import Lookahead, RouterInput, Routing, count_choices, count_tokens
from .row_facts import RowFact

FROM_EMBEDDINGS = ("clustered", "dispersed")
"""Tables that are made from the embeddings of another model."""


class Hash(RouterConfig):
    """A fixed table from token id to experts (Roller et al. 2021); nothing is learned.

    The layer needs ``vocab_size``, and its forward ``token_ids``.
    """

    kind: Literal["hash"] = "hash"
    k: int = Field(default=1, ge=1)
    """Experts each token visits; each weighs 1/k, in ``multihash`` 1."""
    table: Literal["random", "balanced", "clustered", "dispersed", "bigram", "multihash"] = (
        "balanced"
    )
    """random: experts drawn per token id. balanced: frequent ids first, each to the experts with
    the least traffic so far; needs token frequencies when training starts. clustered: k-means of
    another model's token embeddings, one cluster for each expert, so similar tokens share experts.
    dispersed: the tokens of a cluster go evenly to all experts. bigram: drawn per pair of a token
    and the one before. multihash: k draws, one in each of k groups of experts, with weight 1. The
    k experts are segments of one wide MLP, so give each 1/k of its inner width. The paper splits
    that MLP's output as well; here all segments write the whole output."""
    seed: int = 0
    """Seed of the table."""
    embeddings: str | None = None
    """Model folder whose token embeddings ``clustered`` and ``dispersed`` read when training
    starts. It must have the same tokenizer."""

    paper: ClassVar[str] = "Roller et al. 2021"
    learns: ClassVar[bool] = False
    needs_token_counts: ClassVar[bool] = True

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.embeddings is not None and self.table not in FROM_EMBEDDINGS:
            raise ValueError(
                f"embeddings is {self.embeddings!r}, but table is {self.table}, which reads none; "
                "leave embeddings out, or use clustered or dispersed."
            )
        return self

    def build(self, sizes: RouterSizes) -> "HashRouter":
        """Return the module, whose table needs the size of the vocabulary."""
        if sizes.vocab_size is None:
            raise ConfigError("router.kind is hash, which needs a vocabulary; pass vocab_size.")
        return HashRouter(
            self, sizes.num_experts, sizes.vocab_size, sizes.token_counts, sizes.token_embeddings
        )

    def problem_with(self, num_experts: int) -> str | None:
        """Return why k does not fit ``num_experts``, or None."""
        problem = super().problem_with(num_experts)
        if problem is None and self.table == "multihash" and num_experts % self.k:
            return (
                f"router.k is {self.k} and router.table multihash, which needs {self.k} equal "
                f"groups of the layer's {num_experts} experts; use a divisor of {num_experts}."
            )
        return problem

    def architecture(self) -> dict[str, Any]:
        """Return all but the folder of embeddings: the table is saved with the weights."""
        values = super().architecture()
        del values["embeddings"]
        return values

    def reads_at(self) -> Lookahead:
        """Return that the router reads only token ids."""
        return Lookahead.TOKEN

    def reads_of_rows(self) -> RowFact:
        """Return that each row needs its token id."""
        return "token_ids"

    def reads_previous_ids(self) -> bool:
        """Return whether the table is of pairs."""
        return self.table == "bigram"

    def embeddings_folder(self) -> str | None:
        """Return ``embeddings``."""
        return self.embeddings

    def problem_with_tensor(self, name: str, tensor: Tensor, num_experts: int) -> str | None:
        """Return which experts in a table do not exist, or None."""
        if name != "table_VK":
            return None
        lowest, highest = (int(bound) for bound in tensor.aminmax())
        if lowest < 0 or highest >= num_experts:
            return (
                f"names experts from {lowest} to {highest}, but there are {num_experts}; the "
                "weights belong to another configuration"
            )
        return None


class HashRouter(Router):
    """See :class:`Hash`. The table is a buffer, saved and exported with the weights."""

    table_VK: Tensor
    """Rows are token ids; of ``bigram``, numbers of pairs."""
    replays: ClassVar[bool] = True

    def __init__(
        self,
        config: Hash,
        num_experts: int,
        vocab_size: int,
        token_counts: Sequence[int] | None = None,
        token_embeddings: Tensor | None = None,
    ) -> None:
        super().__init__(config, num_experts)
        self.config: Hash = config
        counts = [1] * vocab_size if token_counts is None else token_counts
        self.weight_of_choice = 1.0 if config.table == "multihash" else 1 / config.k
        self.register_buffer("table_VK", self._table(counts, token_embeddings))

    def _table(self, counts: Sequence[int], embeddings_VD: Tensor | None) -> Tensor:
        vocab_size, num_experts = len(counts), self.num_experts
        k, seed = self.k, self.config.seed
        match self.config.table:
            case "balanced":
                return balanced_table(counts, num_experts, k)
            case "random" | "bigram":
                return random_table(vocab_size, num_experts, k, seed)
            case "multihash":
                return segmented_table(vocab_size, num_experts, k, seed)
        if torch.get_default_device().type == "meta":  # a folder's table is read later
            return torch.empty(vocab_size, k, dtype=torch.int32)
        embeddings_VD = _checked(embeddings_VD, vocab_size, self.config.table)
        if self.config.table == "clustered":
            return clustered_table(embeddings_VD, num_experts, k, seed)
        return dispersed_table(embeddings_VD, counts, num_experts, k, seed)

    def route(self, router_input: RouterInput) -> Routing:
        """Look up the experts of each token id."""
        ids_T, valid_T = router_input.ids_T, router_input.valid_T
        if ids_T is None:
            raise ConfigError(
                "router.kind is hash, which reads token ids; pass token_ids to the layer."
            )
        experts_TK = router_input.given_TK
        if experts_TK is None:
            experts_TK = self.table_VK[self._rows(ids_T, router_input)]
        if valid_T is not None:
            experts_TK = torch.where(valid_T.unsqueeze(-1), experts_TK, -1)
        weights_TK = torch.full(experts_TK.shape, self.weight_of_choice, device=ids_T.device)
        return Routing(
            experts_TK=experts_TK,
            weights_TK=weights_TK,
            counts_E=count_choices(experts_TK, self.num_experts),
            num_tokens=count_tokens(valid_T, experts_TK),
        )

    def _rows(self, ids_T: Tensor, router_input: RouterInput) -> Tensor:
        """Return the row of the table that each token reads."""
        if self.config.table != "bigram":
            return ids_T
        previous_T = router_input.previous_ids_T
        if previous_T is None:
            previous_T = previous_rows(ids_T, group_lengths(router_input, len(ids_T)))
        return rows_of_pairs(ids_T, previous_T, len(self.table_VK))


def _checked(embeddings_VD: Tensor | None, vocab_size: int, table: str) -> Tensor:
    """Return the rows of the vocabulary."""
    if embeddings_VD is None:
        raise ConfigError(
            f"router.table is {table}, which needs token embeddings; set router.embeddings to a "
            "model folder, or pass token_embeddings to the layer."
        )
    if embeddings_VD.ndim != 2 or len(embeddings_VD) < vocab_size:
        raise ConfigError(
            f"the token embeddings have shape {list(embeddings_VD.shape)}, but the vocabulary has "
            f"{vocab_size} ids; give those of a model with the same tokenizer."
        )
    return embeddings_VD[:vocab_size]
