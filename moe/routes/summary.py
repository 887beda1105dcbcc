"""What a route file says at a glance: load, entropy and repeats of each layer.

N rows, L MoE layers, E experts, K choices.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..routers.load import load_statistics
from .format import RouteHeader
from .rows import Array, Phase, Routes

MOST_SEQUENCES = 4096
"""Sequences whose last row is remembered from chunk to chunk, the latest ones. More requests than
this are hardly decoded together."""
NOTHING = (-1, np.zeros((0, 0), dtype=np.int32))
"""The last row of a sequence that was not seen yet."""


@dataclass(frozen=True, slots=True)
class LayerSummary:
    """One MoE layer over all rows."""

    layer: int
    """Index in the decoder."""
    choices: int
    """Choices that went to an expert."""
    max_over_mean: float
    """Largest load over mean load; 1 is perfect balance."""
    idle: int
    """Experts without a row."""
    entropy: float
    """Of the load, in nats; log(E) is perfect balance."""
    kept: float | None
    """Share of a token's experts that the token before in its sequence visited, too; None without
    such pairs. At random it is the share of experts that a token visits."""


@dataclass(frozen=True, slots=True)
class Summary:
    """A route file, or several of one recording."""

    rows: int
    phases: dict[str, int]
    """Rows of each phase."""
    sequences: int
    """Beginnings of sequences: rows at position 0."""
    first_step: int
    last_step: int
    most_choices: int
    """Largest number of experts that a row visits in a layer."""
    layers: list[LayerSummary]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        plain = {name: getattr(self, name) for name in self.__slots__}
        layers = [{n: getattr(layer, n) for n in layer.__slots__} for layer in self.layers]
        return plain | {"layers": layers}


def summarize(header: RouteHeader, chunks: Iterable[Routes]) -> Summary:
    """Summarize rows in the order they were written, a chunk at a time."""
    shape_LE = (len(header.moe_layers), header.num_experts)
    counts_LE = np.zeros(shape_LE, dtype=np.int64)
    repeats = Repeats(shape_LE[0])
    phases = dict.fromkeys(Phase, 0)
    rows = sequences = most = 0
    steps: list[int] = []
    for routes in chunks:
        present_NLK = routes.experts_NLK >= 0
        for layer in range(shape_LE[0]):
            ids = routes.experts_NLK[:, layer][present_NLK[:, layer]]
            counts_LE[layer] += np.bincount(ids, minlength=shape_LE[1])
        repeats.add(routes)
        for phase in Phase:
            phases[phase] += int((routes.phases_N == phase).sum())
        rows += len(routes)
        sequences += int((routes.positions_N == 0).sum())
        most = max(most, int(present_NLK.sum(axis=2).max(initial=0)))
        steps += [int(routes.steps_N.min()), int(routes.steps_N.max())]
        steps = [min(steps), max(steps)]
    kept_L = repeats.shares()
    layers = []
    for layer, counts_E, kept in zip(header.moe_layers, counts_LE, kept_L, strict=True):
        total = int(counts_E.sum())
        load = load_statistics(torch.from_numpy(counts_E))
        layers.append(LayerSummary(layer, total, load.max_over_mean, load.idle, load.entropy, kept))
    named = {phase.name.lower(): count for phase, count in phases.items() if count}
    first, last = steps or (0, 0)
    return Summary(rows, named, sequences, first, last, most, layers)


class Repeats:
    """How many of a token's experts the token before in its sequence visited, too."""

    def __init__(self, num_layers: int) -> None:
        self._kept_L = np.zeros(num_layers, dtype=np.int64)
        self._all_L = np.zeros(num_layers, dtype=np.int64)
        self._last: OrderedDict[int, tuple[int, Array]] = OrderedDict()
        """By sequence: position and experts ``[L, K]`` of its last row."""

    def add(self, routes: Routes) -> None:
        """Count the rows of a chunk, and those that continue a sequence of an earlier one."""
        order_N = np.argsort(routes.sequences_N, kind="stable")
        sequences_N, positions_N = routes.sequences_N[order_N], routes.positions_N[order_N]
        experts_NLK = routes.experts_NLK[order_N]
        starts = np.flatnonzero(np.diff(sequences_N, prepend=sequences_N[0] - 1))
        follows_N = np.zeros(len(routes), dtype=bool)
        follows_N[1:] = positions_N[1:] == positions_N[:-1] + 1
        follows_N[starts] = False
        after = np.flatnonzero(follows_N)
        self._count(experts_NLK[after - 1], experts_NLK[after])
        for start, end in zip(starts, [*starts[1:], len(routes)], strict=True):
            sequence = int(sequences_N[start])
            position, before_LK = self._last.pop(sequence, NOTHING)
            if position + 1 == positions_N[start] > 0:
                self._count(before_LK[None], experts_NLK[start : start + 1])
            self._last[sequence] = int(positions_N[end - 1]), experts_NLK[end - 1]
            if len(self._last) > MOST_SEQUENCES:
                self._last.popitem(last=False)

    def shares(self) -> list[float | None]:
        """Return the share of each layer."""
        pairs = zip(self._kept_L.tolist(), self._all_L.tolist(), strict=True)
        return [kept / total if total else None for kept, total in pairs]

    def _count(self, before_NLK: Array, after_NLK: Array) -> None:
        present_NLK = after_NLK >= 0
        kept_NLK = np.zeros_like(present_NLK)
        for choice in range(before_NLK.shape[2]):
            kept_NLK |= after_NLK == before_NLK[:, :, choice : choice + 1]
        self._kept_L += (kept_NLK & present_NLK).sum(axis=(0, 2))
        self._all_L += present_NLK.sum(axis=(0, 2))
