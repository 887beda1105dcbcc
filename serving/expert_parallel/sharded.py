"""The experts of a layer divided between owners. N rows, K choices, D model width."""

import torch
from torch import Tensor

from ...errors import ExpertReadError
from ...kernels.waves import start_waves
from ...moe.experts.base import LayerExperts
from ...moe.routers.routing import Routing
from ..experts.chosen import chosen_experts, rows_that_chose
from ..experts.store import ExpertStore
from .run_experts import run_experts
from .team import Team


class ShardedExperts(LayerExperts):
    """Sends rows to the owners of their experts, and computes its own part meanwhile.

    Owners return the line of every routed row, not sums of them. They are combined here, in k
    order, as if one process had computed them all; so the bits are the same.
    """

    def __init__(
        self, store: ExpertStore, team: Team, layer: int, num_experts: int, num_layers: int
    ) -> None:
        super().__init__()
        self._store, self._team, self._layer = store, team, layer
        self._num_experts = num_experts
        self._num_slots = store.num_slots + team.num_slots
        self.share_in_memory = min(1.0, self._num_slots / (num_experts * num_layers))

    def extra_repr(self) -> str:
        """Say how many experts there are and who has them, for ``repr``."""
        return (
            f"{self._num_experts} experts of {self._team.ownership.num_owners} owners, whose "
            f"memory has {self._num_slots} slots for the experts of all layers"
        )

    def announce(self, routing: Routing) -> None:
        """Let owners begin to read the chosen experts while the model computes something else."""
        own = self._team.prefetch(self._layer, chosen_experts(routing))
        self._store.prefetch(self._layer, own)

    def keep(self, routing: Routing) -> None:
        """Protect the chosen experts of this process from what is read ahead."""
        self._store.keep(self._layer, chosen_experts(routing))

    def forward(
        self,
        x_ND: Tensor,
        experts_NK: Tensor,
        weights_NK: Tensor,
        most_choices: int | None = None,
    ) -> Tensor:
        """Return the weighted sum of each row's experts, ``[N, D]``."""
        ids_NK = experts_NK.to(torch.int32)
        is_own_NK, questions = self._team.ask(self._layer, x_ND, ids_NK.numpy())
        own_NK = ids_NK.masked_fill(torch.from_numpy(~is_own_NK), -1)
        try:
            waves = start_waves(x_ND, experts_NK, weights_NK, self._num_experts)
            try:
                run_experts(self._store, self._layer, self._num_experts, waves, own_NK)
            except ExpertReadError as error:
                error.rows = rows_that_chose(error.experts, own_NK)
                raise
            self._team.count(self._layer, ids_NK.numpy(), is_own_NK)  # while owners compute
            for question in questions:
                waves.fill(question.routed_r, question.lines())
        except BaseException:
            for question in questions:
                question.drop()
            raise
        return waves.result()
