"""Random experts in training (THOR).

T tokens, G sequences, E experts, K choices.
"""

import zlib
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from .draws import draw_rows
from .groups import group_lengths, groups_of_rows
from .linear import Stepped
from .router import Router, RouterConfig, RouterSizes
from .routing import Lookahead, RouterInput, Routing, count_choices, count_tokens


class Stochastic(RouterConfig):
    """Training draws experts at random, all equally likely (THOR, Zuo et al. 2022).

    Nothing is learned, and a choice weighs 1/k. THOR adds a loss between the predictions of two
    forwards with different draws; that belongs to an objective and is not here.
    """

    paper: ClassVar[str] = "Zuo et al. 2022 (THOR)"
    learns: ClassVar[bool] = False
    varies: ClassVar[bool] = True

    kind: Literal["stochastic"] = "stochastic"
    k: int = Field(default=1, ge=1)
    """Different experts that a token visits in training."""
    drawn_per: Literal["batch", "sequence"] = "batch"
    """What shares a draw. batch: all tokens of a step, on all ranks (THOR). sequence: the tokens of
    a sequence, so that a step trains all experts."""
    evaluation: Literal["mean", "fixed"] = "mean"
    """mean: every token visits all experts, with weight 1/E each. fixed: all visit experts 0 to
    k - 1, at the cost of training. Neither draws, so texts can be repeated."""
    seed: int = 0
    """Seed of the draws."""

    def build(self, sizes: RouterSizes) -> "StochasticRouter":
        """Return the module."""
        return StochasticRouter(self, sizes.num_experts, sizes.layer)

    def architecture(self) -> dict[str, Any]:
        """Return what evaluation computes; training may draw otherwise."""
        values = super().architecture()
        del values["drawn_per"], values["seed"]
        if self.evaluation == "mean":
            values["k"] = None
        return values

    def reads_at(self) -> Lookahead:
        """Return that the choice is known before the forward."""
        return Lookahead.TOKEN

    def draws(self) -> bool:
        """Return whether sequences draw; a batch draws from its step alone."""
        return self.drawn_per == "sequence"


class StochasticRouter(Stepped, Router):
    """See :class:`Stochastic`."""

    replays: ClassVar[bool] = True

    def __init__(self, config: Stochastic, num_experts: int, layer: int = 0) -> None:
        super().__init__(config, num_experts)
        self.config: Stochastic = config
        self.stream = zlib.crc32(f"stochastic/{config.seed}/{layer}".encode())
        self.start_steps()

    def route(self, router_input: RouterInput) -> Routing:
        """Draw experts in training; otherwise take all, or the first ones."""
        ids_T, x_TD = router_input.ids_T, router_input.x_TD
        rows = x_TD if ids_T is None else ids_T
        assert rows is not None, "the caller must pass token ids or hidden rows"
        num_rows, device = rows.shape[0], rows.device
        if router_input.given_TK is not None:
            experts_TK = router_input.given_TK
        elif self.training:
            experts_TK = self._drawn(router_input, num_rows, device)
        else:
            width = self.num_experts if self.config.evaluation == "mean" else self.k
            experts_TK = torch.arange(width, device=device).expand(num_rows, -1)
        experts_TK = experts_TK.int()
        weight = 1 / max(1, experts_TK.shape[1])
        weights_TK = torch.full(experts_TK.shape, weight, device=experts_TK.device)
        if router_input.valid_T is not None:
            experts_TK = torch.where(router_input.valid_T.unsqueeze(1), experts_TK, -1)
        return Routing(
            experts_TK=experts_TK,
            weights_TK=weights_TK,
            counts_E=count_choices(experts_TK, self.num_experts),
            num_tokens=count_tokens(router_input.valid_T, experts_TK),
        )

    def _drawn(self, router_input: RouterInput, num_rows: int, device: torch.device) -> Tensor:
        """Return ``[T, K]``: k different experts for each sequence, or for all."""

        def draw(count: int, generator: torch.Generator | None) -> Tensor:
            return torch.rand(count, self.num_experts, generator=generator)

        lengths: tuple[int, ...] = (num_rows,)
        one = replace(router_input, lengths=(1,), draw_keys=(0,))
        if self.config.drawn_per == "sequence":
            lengths = group_lengths(router_input, num_rows)
            one = replace(router_input, lengths=(1,) * len(lengths))
        numbers_GE = draw_rows(one, len(lengths), int(self.step), self.stream, draw)
        experts_GK = numbers_GE.topk(self.k, dim=1).indices.to(device)
        return experts_GK[groups_of_rows(lengths, device)]
