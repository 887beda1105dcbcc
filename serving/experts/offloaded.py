"""Experts that live in a store. N rows, D model width, K choices."""

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import replace

import torch
from torch import Tensor

from ...errors import ExpertReadError
from ...kernels.adapted_waves import AdaptedWaves
from ...kernels.values.channel_weights import ChannelExpertWeights, ChannelLimits
from ...kernels.values.expert_update import ExpertUpdate
from ...kernels.values.quantized_weights import SlotWeights
from ...kernels.values.row_channels import RowChannels
from ...kernels.waves import Waves, start_waves
from ...moe.adapters.rows import RowUpdates
from ...moe.experts.adapted import rows_without
from ...moe.experts.base import LayerExperts
from ...moe.routers.routing import Routing
from .chosen import Choice, chosen_experts, count_rows, rows_that_chose
from .fallback import Fallback
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
        limits: ChannelLimits | None = None,
        fallback: Fallback | None = None,
    ) -> None:
        super().__init__()
        self._limits, self._fallback = limits, fallback
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
    def num_experts(self) -> int:
        """The experts of this layer."""
        return self._num_experts

    @property
    def store(self) -> ExpertStore:
        """The store that all layers share."""
        return self._store

    def announce(self, routing: Routing) -> None:
        """Begin to read the chosen experts while the model computes something else."""
        self._store.prefetch(self._layer, chosen_experts(routing))

    def keep(self, routing: Routing) -> None:
        """Protect the chosen experts that are in memory from what is read ahead."""
        self._store.keep(self._layer, chosen_experts(routing))

    def forward(
        self,
        x_ND: Tensor,
        experts_NK: Tensor,
        weights_NK: Tensor,
        most_choices: int | None = None,
    ) -> Tensor:
        """Return the weighted sum of each row's experts, ``[N, D]``."""
        waves = start_waves(x_ND, experts_NK, weights_NK, self._num_experts)
        self._stream([waves], x_ND, experts_NK, weights_NK)
        return waves.result()

    def by_channel(
        self, x_ND: Tensor, experts_NK: Tensor, weights_NK: Tensor, channels: RowChannels
    ) -> Tensor:
        """See :class:`LayerExperts`. Experts are read as a whole."""
        waves = start_waves(x_ND, experts_NK, weights_NK, self._num_experts, channels)
        self._stream([waves], x_ND, experts_NK, weights_NK)
        return waves.result()

    def adapted(
        self, x_ND: Tensor, experts_NK: Tensor, weights_NK: Tensor, updates: RowUpdates
    ) -> Tensor:
        """See :class:`LayerExperts`. An expert is read once for all rows that chose it."""
        rows: list[tuple[Tensor, ExpertUpdate | None]] = list(updates)
        free_n = rows_without(updates, len(x_ND))
        if len(free_n):
            rows.append((free_n, None))
        waves: list[Waves] = []
        for rows_n, update in rows:
            x_nD, experts_nK = x_ND.index_select(0, rows_n), experts_NK.index_select(0, rows_n)
            parts = (x_nD, experts_nK, weights_NK.index_select(0, rows_n))
            if update is None:
                waves.append(start_waves(*parts, self._num_experts))
            else:
                waves.append(AdaptedWaves(*parts, self._num_experts, update))
        self._stream(waves, x_ND, experts_NK, weights_NK, needs_all=True)
        y_ND = torch.empty_like(x_ND)
        for (rows_n, _), wave in zip(rows, waves, strict=True):
            y_ND[rows_n] = wave.result()
        return y_ND

    def _stream(
        self,
        waves: Sequence[Waves],
        x_ND: Tensor,
        experts_NK: Tensor,
        weights_NK: Tensor,
        needs_all: bool = False,
    ) -> None:
        """Run all experts that the rows chose on the waves, as they come into memory.

        ``needs_all`` says that gates of the experts alone do not tell which channels are needed.
        """
        rows = None if needs_all else (x_ND, experts_NK)
        rows_of = count_rows(experts_NK)
        copied: list[int] = []
        if self._fallback is not None:
            copied = self._fallback.choose(self._layer, rows_of, experts_NK, weights_NK)
            for wave in waves:
                self._fallback.add(self._layer, wave, copied)
        left = rows_of.keys() - set(copied)
        try:
            # Closed also when computing fails: the next forward needs a consistent store.
            choice = Choice(x_ND, experts_NK.numpy())
            with closing(self._store.stream(self._layer, rows_of, choice, copied)) as stream:
                for ready, experts in stream:
                    if self._limits is not None:
                        assert isinstance(experts, ChannelExpertWeights), "limits need channels"
                        experts = replace(experts, limits=self._limits)
                    with closing(self._whole(ready, experts, rows)) as whole:
                        for some in whole:
                            for wave in waves:
                                wave.add(experts, only=some)
                    left -= set(ready)
        except ExpertReadError as error:
            error.rows = rows_that_chose(error.experts, experts_NK)
            raise
        assert not left, f"experts {left} of layer {self._layer} have rows and never came"
        if self._fallback is not None and self._fallback.reads_later:
            self._store.prefetch(self._layer, copied)

    def _whole(
        self, ready: list[int], experts: SlotWeights, rows: tuple[Tensor, Tensor] | None
    ) -> Generator[list[int]]:
        """Yield the experts of a wave as soon as all is here that ``rows`` need of them."""
        channels = self._store.channels
        if channels is None:
            yield ready
            return
        assert isinstance(experts, ChannelExpertWeights), "only these have channels"
        yield from channels.waves(self._layer, ready, experts, rows)
