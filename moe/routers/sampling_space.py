"""Sampling-space experts: an even random split in training, their average afterwards.

T tokens, E experts.
"""

import zlib
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from .averaged import AveragedConfig
from .draws import draw_rows
from .linear import Stepped
from .router import Router, RouterSizes
from .routing import Lookahead, RouterInput, Routing, count_choices, count_tokens


class SamplingSpace(AveragedConfig):
    """Training splits each image's tokens evenly and at random (SS-MoE, Luo et al. 2023).

    Nothing is learned, and the weight is 1. After each step the experts move towards each other
    (``exchange``), so that their average serves all tokens: outside training the layer is one MLP
    with the mean of the experts' weights, and no token visits an expert.
    """

    paper: ClassVar[str] = "Luo et al. 2023 (SS-MoE)"
    learns: ClassVar[bool] = False

    kind: Literal["sampling_space"] = "sampling_space"
    k: int = Field(default=1, ge=1, le=1)
    """Experts each token visits: one."""
    seed: int = 0
    """Seed of the splits."""

    def build(self, sizes: RouterSizes) -> "SamplingSpaceRouter":
        """Return the module."""
        return SamplingSpaceRouter(self, sizes.num_experts, sizes.layer)

    def architecture(self) -> dict[str, Any]:
        """Return the kind alone: the rest is for training."""
        return {"kind": self.kind}

    def reads_at(self) -> Lookahead:
        """Return that the choice is known before the forward."""
        return Lookahead.TOKEN

    def draws(self) -> bool:
        """Return that training draws."""
        return True


class SamplingSpaceRouter(Stepped, Router):
    """See :class:`SamplingSpace`."""

    replays: ClassVar[bool] = True

    def __init__(self, config: SamplingSpace, num_experts: int, layer: int = 0) -> None:
        super().__init__(config, num_experts)
        self.config: SamplingSpace = config
        self.stream = zlib.crc32(f"sampling_space/{config.seed}/{layer}".encode())
        self.start_steps()

    def route(self, router_input: RouterInput) -> Routing:
        """Split each sequence's rows over the experts in training; otherwise choose none."""
        ids_T, x_TD = router_input.ids_T, router_input.x_TD
        rows = x_TD if ids_T is None else ids_T
        assert rows is not None, "the caller must pass token ids or hidden rows"
        num_rows, device = rows.shape[0], rows.device
        if router_input.given_TK is not None:
            experts_TK = router_input.given_TK
        elif self.training:
            drawn_T = draw_rows(router_input, num_rows, int(self.step), self.stream, self._split)
            experts_TK = drawn_T.int().unsqueeze(1).to(device)
        else:
            experts_TK = torch.full((num_rows, 1), -1, dtype=torch.int32, device=device)
        if router_input.valid_T is not None:
            experts_TK = torch.where(router_input.valid_T.unsqueeze(1), experts_TK, -1)
        return Routing(
            experts_TK=experts_TK,
            weights_TK=torch.ones(experts_TK.shape, device=device),
            counts_E=count_choices(experts_TK, self.num_experts),
            num_tokens=count_tokens(router_input.valid_T, experts_TK),
        )

    def _split(self, count: int, generator: torch.Generator | None) -> Tensor:
        """Return the expert of each of ``count`` rows; experts' shares differ by one at most."""
        order_T = torch.randperm(count, generator=generator)
        return order_T * self.num_experts // max(1, count)
