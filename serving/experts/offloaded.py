"""Experts that live in a store. N rows, D model width, K choices."""

from collections.abc import Sequence
from contextlib import closing

import torch
from torch import Tensor

from ...errors import ExpertReadError
from ...kernels.waves import start_waves
from ...moe.experts.base import LayerExperts
from ...moe.routers.routing import Routing, count_choices
from .fallback import Fallback
from .read_ahead import Choice
from .store import ExpertStore


class OffloadedExperts(LayerExperts):
    """Replaces :class:`moeyard.moe.experts.resident.Experts` for inference, bit for bit.

    Experts come in waves; each routed row has its own line of the output, filled once, and the
    lines are combined in k order at the end, as in the resident case. Only with a ``fallback`` are
    some rows those of low-bit copies.
    """

    def __init__(
        self,
        store: ExpertStore,
        layer: int,
        num_experts: int,
        num_layers: int,
        fallback: Fallback | None = None,
    ) -> None:
        super().__init__()
        self._fallback = fallback
        self._store = store
        self._layer = layer
        self._num_experts = num_experts
        self._num_in_model = num_experts * num_layers
        self.share_in_memory = min(1.0, store.num_slots / self._num_in_model)

    def extra_repr(self) -> str:
        """Say how many experts there are and how many fit into memory, for ``repr``."""
        store = self._store
        return (
            f"{self._num_experts} experts, on disk; memory has {store.num_slots} slots for the "
            f"{self._num_in_model} experts of all layers"
        )

    @property
    def store(self) -> ExpertStore:
        """The store that all layers share."""
        return self._store

    def announce(self, routing: Routing) -> None:
        """Begin to read the chosen experts while the model computes something else."""
        self._store.prefetch(self._layer, _chosen(routing))

    def keep(self, routing: Routing) -> None:
        """Protect the chosen experts that are in memory from what is read ahead."""
        self._store.keep(self._layer, _chosen(routing))

    def forward(
        self,
        x_ND: Tensor,
        experts_NK: Tensor,
        weights_NK: Tensor,
        most_choices: int | None = None,
    ) -> Tensor:
        """Return the weighted sum of each row's experts, ``[N, D]``."""
        counts = count_choices(experts_NK, self._num_experts).tolist()
        rows_of = {expert: rows for expert, rows in enumerate(counts) if rows}
        waves = start_waves(x_ND, experts_NK, weights_NK, self._num_experts)
        copied: list[int] = []
        if self._fallback is not None:
            copied = self._fallback.choose(self._layer, rows_of, experts_NK, weights_NK)
            self._fallback.add(self._layer, waves, copied)
        try:
            # Closed also when computing fails: the next forward needs a consistent store.
            choice = Choice(x_ND, experts_NK.numpy())
            with closing(self._store.stream(self._layer, rows_of, choice, copied)) as stream:
                for ready, experts in stream:
                    waves.add(experts, only=ready)
        except ExpertReadError as error:
            error.rows = _rows_that_chose(error.experts, experts_NK)
            raise
        if self._fallback is not None and self._fallback.reads_later:
            self._store.prefetch(self._layer, copied)
        return waves.result()


def _rows_that_chose(experts: Sequence[int], experts_NK: Tensor) -> tuple[int, ...]:
    has_one_N = torch.isin(experts_NK, torch.tensor(experts)).any(dim=1)
    return tuple(torch.nonzero(has_one_N).flatten().tolist())


def _chosen(routing: Routing) -> list[int]:
    return torch.nonzero(routing.counts_E).flatten().tolist()
