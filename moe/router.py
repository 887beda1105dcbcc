"""Routers and their configurations: top-k and hash.

T tokens, D model width, E experts, K choices, V vocabulary.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from ..errors import ConfigError
from ..kernels.row_stable import MIN_ROWS_FP32, row_stable_linear
from .hash_table import balanced_table, random_table
from .routing import Lookahead, RouterInput, Routing, count_choices, count_tokens


class RouterConfig(BaseModel):
    """What all routers share."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    k: int = Field(default=2, ge=1)
    """Experts each token visits."""


class TopK(RouterConfig):
    """Softmax over a linear layer's logits, the k largest win (Shazeer et al. 2017; Switch)."""

    kind: Literal["topk"] = "topk"
    renormalize: bool = True
    """Divide the chosen probabilities by their sum (Mixtral, released Qwen3-MoE checkpoints)."""
    balance_loss: float = Field(default=0.01, ge=0)
    """Coefficient of the Switch/GShard balance loss; at perfect balance the loss itself is 1."""
    z_loss: float = Field(default=0.0, ge=0)
    """Coefficient of the ST-MoE z-loss."""
    jitter: float = Field(default=0.0, ge=0, lt=1)
    """Training multiplies the router's input by U(1 - jitter, 1 + jitter) (Switch). The draws
    belong to a rank, so results then depend on the number of ranks."""


class Hash(RouterConfig):
    """A fixed table from token id to experts (Roller et al. 2021); nothing is learned."""

    kind: Literal["hash"] = "hash"
    k: int = Field(default=1, ge=1)
    """Experts each token visits; each weighs 1/k."""
    table: Literal["random", "balanced"] = "balanced"
    """random: experts drawn per token id. balanced: frequent ids first, each to the experts with
    the least traffic so far; needs token frequencies when training starts."""
    seed: int = 0
    """Seed of the table."""


AnyRouter = Annotated[TopK | Hash, Field(discriminator="kind")]


class Router(nn.Module):
    """Base of routers. ``route`` is called where ``lookahead`` says, by training and serving."""

    lookahead: Lookahead = Lookahead.FFN_INPUT
    config: TopK | Hash

    def __init__(self, k: int, num_experts: int) -> None:
        super().__init__()
        if k > num_experts:
            raise ConfigError(
                f"router.k is {k}, but the layer has {num_experts} experts; "
                f"use a value from 1 to {num_experts}."
            )
        self.k = k
        self.num_experts = num_experts

    def route(self, router_input: RouterInput) -> Routing:
        """Choose experts for every row."""
        raise NotImplementedError


class TopKRouter(Router):
    """See :class:`TopK`. Scores are computed in fp32 (fp64 for fp64 input) whatever x's type."""

    def __init__(self, config: TopK, d_model: int, num_experts: int) -> None:
        super().__init__(config.k, num_experts)
        self.config: TopK = config
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))
        nn.init.normal_(self.weight, std=d_model**-0.5)

    def route(self, router_input: RouterInput) -> Routing:
        """Choose the k most probable experts of each row of ``x_TD``."""
        x_TD, valid_T = router_input.x_TD, router_input.valid_T
        assert x_TD is not None, "the caller must hand over hidden rows"
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        x_TD = x_TD.to(dtype)
        if self.config.jitter and self.training:
            x_TD = x_TD * (1 + self.config.jitter * (2 * torch.rand_like(x_TD) - 1))
        if torch.is_grad_enabled() or dtype != torch.float32:
            logits_TE = F.linear(x_TD, self.weight.to(dtype))
        else:
            logits_TE = row_stable_linear(x_TD, self.weight.to(dtype), MIN_ROWS_FP32)
        scores_TE = logits_TE.softmax(dim=-1)
        weights_TK, chosen_TK = scores_TE.topk(self.k, dim=-1)
        if self.config.renormalize:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        experts_TK = chosen_TK.int()
        z_T = logits_TE.logsumexp(dim=-1).square()
        if valid_T is not None:
            experts_TK = torch.where(valid_T.unsqueeze(-1), experts_TK, -1)
            scores_TE = torch.where(valid_T.unsqueeze(-1), scores_TE, 0)
            z_T = torch.where(valid_T, z_T, 0)
        return Routing(
            experts_TK=experts_TK,
            weights_TK=weights_TK,
            counts_E=count_choices(experts_TK, self.num_experts),
            num_tokens=count_tokens(valid_T, experts_TK),
            probability_sums_E=scores_TE.sum(dim=0),
            z_sum=z_T.sum(),
        )


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


def build_router(
    config: TopK | Hash,
    d_model: int,
    num_experts: int,
    vocab_size: int | None = None,
    token_counts: Sequence[int] | None = None,
) -> Router:
    """Build the router that ``config`` describes."""
    if isinstance(config, TopK):
        return TopKRouter(config, d_model, num_experts)
    if vocab_size is None:
        raise ConfigError("router.kind is hash, which needs a vocabulary; pass vocab_size.")
    return HashRouter(config, num_experts, vocab_size, token_counts)
