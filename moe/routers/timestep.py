"""One expert for each interval of a diffusion process's time. T tokens, E experts."""

from typing import ClassVar, Literal

import torch
from pydantic import Field

from ...errors import ConfigError
from .router import Router, RouterConfig, RouterSizes
from .routing import Lookahead, RouterInput, Routing, count_choices, count_tokens
from .row_facts import RowFact
from .row_numbers import checked


class Timestep(RouterConfig):
    """Time alone chooses: E equal intervals, one expert each (SS-MoE, Luo et al. 2023).

    Reads ``RouterInput.timesteps_T``: ``layer(x, timesteps=...)``, or ``Batch.timesteps_T``.
    Nothing is learned, and the weight is 1. The paper has four intervals of a thousand steps and a
    whole network for each; here only the experts differ.
    """

    paper: ClassVar[str] = "Luo et al. 2023 (SS-MoE)"
    learns: ClassVar[bool] = False

    kind: Literal["timestep"] = "timestep"
    k: int = Field(default=1, ge=1, le=1)
    """Experts each token visits: one."""
    num_timesteps: float = Field(default=1000, gt=0)
    """Where time ends. Expert e has the timesteps from ``e * num_timesteps / E`` to below
    ``(e + 1) * num_timesteps / E``; the last one has the end, too."""

    def build(self, sizes: RouterSizes) -> "TimestepRouter":
        """Return the module."""
        return TimestepRouter(self, sizes.num_experts)

    def reads_at(self) -> Lookahead:
        """Return that the choice is known before the forward."""
        return Lookahead.TOKEN

    def reads_of_rows(self) -> RowFact:
        """Return that each row needs its time."""
        return "timesteps"


class TimestepRouter(Router):
    """See :class:`Timestep`."""

    replays: ClassVar[bool] = True

    def __init__(self, config: Timestep, num_experts: int) -> None:
        super().__init__(config, num_experts)
        self.config: Timestep = config

    def route(self, router_input: RouterInput) -> Routing:
        """Find each row's interval."""
        times_T, valid_T = router_input.timesteps_T, router_input.valid_T
        if times_T is None:
            raise ConfigError(
                "router.kind is timestep, which reads each token's timestep; pass timesteps to the "
                "layer."
            )
        end = self.config.num_timesteps
        times_T = checked(times_T, valid_T, "timesteps", end)
        expert_T = (times_T.double() * self.num_experts / end).floor().int()
        experts_TK = router_input.given_TK
        if experts_TK is None:
            experts_TK = expert_T.clamp(max=self.num_experts - 1).unsqueeze(1)
        if valid_T is not None:
            experts_TK = torch.where(valid_T.unsqueeze(1), experts_TK, -1)
        return Routing(
            experts_TK=experts_TK,
            weights_TK=torch.ones(experts_TK.shape, device=experts_TK.device),
            counts_E=count_choices(experts_TK, self.num_experts),
            num_tokens=count_tokens(valid_T, experts_TK),
        )
