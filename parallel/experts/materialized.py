"""Busy experts are copied to more ranks for a step: Hecate's fully sharded sparse data parallelism.

An expert has one owner, who keeps its weights and its optimizer's state. At the start of a step the
load of the last steps says which experts will be busy. Their weights travel to other ranks while
earlier layers compute, and the copies' gradients travel back while earlier layers run backward.
Rows stay on their rank where it has a copy. Which rank computes a row does not change the numbers.

L MoE layers, E experts.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from ...moe.experts.base import LayerExperts
from ...moe.experts.resident import Experts
from ..planning.calibrate import CopyCosts, calibrate
from ..planning.copies_record import record_of
from ..planning.dispatch import HolderTable
from ..planning.load_window import LoadWindow
from ..planning.materialize import CopyBudget, materialize
from ..planning.placement import Placement, Topology
from ..planning.reshard import reshard
from .copies import Copies, WithCopies, begin_with_zeros, sums_of, weights_of
from .lane import Pending
from .sparse_collectives import SparseCollectives
from .stream_lane import open_lane


class MaterializedExperts:
    """The copies of all layers of a model, step by step. All ranks make the same calls.

    ``budget`` says how many copies of a layer fit on a rank. With ``rematerialize`` only two layers
    have copies at a time: weights travel again in backward, and memory does not grow with L.
    """

    def __init__(
        self,
        layers: Sequence[Experts],
        owners: Sequence[Placement],
        topology: Topology,
        collectives: SparseCollectives,
        budget: CopyBudget,
        window: LoadWindow,
        rematerialize: bool,
    ) -> None:
        self.layers, self.topology = layers, topology
        self.set_owners(owners)
        self._rank = collectives.rank
        self._collectives, self._budget = collectives, budget
        self.rematerialize = rematerialize
        with_copies = layers[: 2 if rematerialize else None]
        self._buffers = [Copies(own, budget.per_rank) for own in with_copies]
        self._in_buffer: list[int | None] = [None for _ in self._buffers]
        """The layer whose experts a buffer has."""
        self._lane = open_lane("copies")
        self._arriving: dict[int, Pending[None]] = {}
        """By layer: the weights that a buffer has or will have."""
        self._returning: list[tuple[int, Pending[dict[int, list[Tensor]]]]] = []
        """Layers whose copies' gradients are on their way to this rank, the first one first."""
        self._backwards_left: list[int] = []
        self._goes_forward = True
        self.window = window
        self.costs: CopyCosts | None = None
        """If known, an expert is copied only where that saves time."""
        self.placements = list(owners)
        """Of this step, by layer."""
        self.tables: list[HolderTable] = []
        """Where rows go in this step, by layer; none between steps."""

    @property
    def most_copied(self) -> int:
        """Different experts of a layer that all ranks can have at once."""
        return min(self._budget.experts, self._budget.per_rank)

    @property
    def num_bytes(self) -> int:
        """Memory of the copies and their gradients on this rank."""
        return sum(buffer.num_bytes for buffer in self._buffers)

    def set_owners(self, owners: Sequence[Placement]) -> None:
        """Remember who owns the experts of each layer; their slots have moved already."""
        self.owners = list(owners)
        device = self.layers[0].fc1.device
        self._owner_tables = [torch.tensor([*o.owner_E, -1], device=device) for o in owners]

    def better_owners(self) -> list[Placement]:
        """Return owners that suit the load of the last steps; the same ones if none are better."""
        load_LE = self.window.mean_LE()
        return reshard(self.owners, load_LE, self.topology, self._budget)

    def owner_of(self, layer: int, experts: Tensor) -> Tensor:
        """Return the ranks that own the experts of a layer, -1 for -1."""
        return self._owner_tables[layer][experts]

    def trial(self, number: int) -> tuple[Callable[[], None], Callable[[], None]]:
        """Return two calls to be timed between steps: ``number`` experts go to all ranks, and
        their gradients come back. Owners take turns."""
        own, buffer, owners = self.layers[0], self._buffers[0], self.owners[0]
        rounds = zip_longest(*owners.owned_by_rank())
        copied = [e for experts in rounds for e in experts if e is not None][:number]
        everyone = range(owners.num_ranks)
        placement = owners.with_holders(
            [everyone if expert in copied else () for expert in range(owners.num_experts)]
        )
        buffer.hold([expert for expert in copied if expert not in own.expert_ids])

        def gather() -> None:
            self._collectives.gather(placement, partial(_weights, own), buffer.weights_of)

        def reduce() -> None:
            self._collectives.reduce(placement, buffer.gradients_of, partial(_sums, own))

        return gather, reduce

    def begin_step(self, micro_batches: int) -> None:
        """Choose the step's copies; their weights start to travel."""
        choose = materialize if self.costs is None else partial(calibrate, costs=self.costs)
        self.placements = [
            choose(owners, load_E, self.topology, self._budget)
            for owners, load_E in zip(self.owners, self.window.mean_LE(), strict=True)
        ]
        self.tables = [
            HolderTable.of(placement, self.topology, self._rank).to(own.fc1.device)
            for placement, own in zip(self.placements, self.layers, strict=True)
        ]
        self._backwards_left = [micro_batches for _ in self.layers]
        self._in_buffer = [None for _ in self._buffers]
        for layer in range(len(self._buffers)):
            self._fetch(layer)

    def experts_of(self, layer: int) -> LayerExperts:
        """Return the layer's own experts and its copies, if any, whose weights are here."""
        self._need(layer)
        self._goes_forward |= layer == 0
        if self._goes_forward:  # and is not computed again in backward
            self._fetch(layer + 1)
        own, copies = self.layers[layer], self._buffer(layer)
        return WithCopies(own, copies) if copies.held else own

    @contextmanager
    def backward_of(self, layer: int) -> Iterator[None]:
        """Hold the layer's copies during its backward; then their gradients travel to the owners.

        Without ``rematerialize`` they travel once, after the last micro-batch.
        """
        self._goes_forward = False
        self._add_arrived()
        self._need(layer)
        self._fetch(layer - 1)
        yield
        self._buffer(layer).collect_gradients()
        self._backwards_left[layer] -= 1
        if self.rematerialize or self._backwards_left[layer] == 0:
            self._returning.append((layer, self._lane.submit(partial(self._reduce, layer))))
            # The next layer to use the buffer fills it again. These gradients leave it first.
            self._in_buffer[layer % len(self._buffers)] = None

    def end_backward(self) -> None:
        """Wait until all gradients are with the owners."""
        self._add_arrived(waits=True)
        self.tables = []

    def end_step(self, counts_LE: Tensor) -> None:
        """Remember a step's routed rows of the global batch."""
        self.window = self.window.after(counts_LE)

    def record(self, counts_LE: Tensor) -> dict[str, Any]:
        """Return what this step's copies did for its routed rows; see planning/copies_record.py."""
        return record_of(self.placements, counts_LE, self.topology)

    def _buffer(self, layer: int) -> Copies:
        return self._buffers[layer % len(self._buffers)]

    def _need(self, layer: int) -> None:
        self._fetch(layer)
        self._arriving[layer].result()

    def _fetch(self, layer: int) -> None:
        """Let a layer's copies travel to its buffer, unless it has them or there is no such layer.

        The buffer's last layer has computed, and the lane sends its gradients first.
        """
        if not 0 <= layer < len(self.layers):
            return
        number = layer % len(self._buffers)
        if self._in_buffer[number] != layer:
            self._in_buffer[number] = layer
            self._arriving[layer] = self._lane.submit(partial(self._gather, layer))

    def _gather(self, layer: int) -> None:
        own, copies, placement = self.layers[layer], self._buffer(layer), self.placements[layer]
        held = placement.held_by(self._rank)
        copies.hold([expert for expert in held if expert not in own.expert_ids])
        self._collectives.gather(placement, partial(_weights, own), copies.weights_of)

    def _reduce(self, layer: int) -> dict[int, list[Tensor]]:
        gradients_of, like = self._buffer(layer).gradients_of, partial(_sums, self.layers[layer])
        return self._collectives.reduce(self.placements[layer], gradients_of, like)

    def _add_arrived(self, waits: bool = False) -> None:
        """Add what came back to the owners' gradients: in this thread, which also adds others."""
        while self._returning and (waits or self._returning[0][1].done()):
            layer, future = self._returning.pop(0)
            own = self.layers[layer]
            for expert, values in future.result().items():
                begin_with_zeros(own)
                for total, value in zip(_sums(own, expert), values, strict=True):
                    total.add_(value)


def _weights(own: Experts, expert: int) -> list[Tensor]:
    return weights_of(own, own.expert_ids.index(expert))


def _sums(own: Experts, expert: int) -> list[Tensor]:
    return sums_of(own, own.expert_ids.index(expert))
