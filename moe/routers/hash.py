"""The hash router (Roller et al. 2021). T tokens, K choices, V vocabulary."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import ConfigError
from .config import Hash
from .hash_table import balanced_table, random_table
from .router import Router
from .routing import Lookahead, RouterInput, Routing, count_choices, count_tokens


class HashRouter(Router):
    """See :class:`Hash`. The table is a buffer, saved and exported with the weights."""

    lookahead = Lookahead.TOKEN
    table_VK: Tensor

    def __init__(
        self,
        config: Hash,
        num_experts: int,
        vocab_size: int,
        token_counts: Sequence[int] | None = None,
    ) -> None:
        super().__init__(config.k, num_experts)
        self.config = config
        if config.table == "random":
            table_VK = random_table(vocab_size, num_experts, config.k, config.seed)
        else:
            counts = [1] * vocab_size if token_counts is None else token_counts
            table_VK = balanced_table(counts, num_experts, config.k)
        self.register_buffer("table_VK", table_VK)

    def route(self, router_input: RouterInput) -> Routing:
        """Look the experts of each token id up."""
        ids_T, valid_T = router_input.ids_T, router_input.valid_T
        if ids_T is None:
            raise ConfigError(
                "router.kind is hash, which reads token ids; pass token_ids to the layer."
            )
        experts_TK = self.table_VK[ids_T]
        if valid_T is not None:
            experts_TK = torch.where(valid_T.unsqueeze(-1), experts_TK, -1)
        weights_TK = torch.full(experts_TK.shape, 1 / self.k, device=ids_T.device)
        return Routing(
            experts_TK=experts_TK,
            weights_TK=weights_TK,
            counts_E=count_choices(experts_TK, self.num_experts),
            num_tokens=count_tokens(valid_T, experts_TK),
        )
