"""Send dense gradients in the parts of backward where the link between nodes has room.

FSMoE (Pan et al., ASPLOS 2025) does it in two steps: it fills the free time of each layer, going
backward, and spreads the remaining bytes by differential evolution. A byte that delays a layer
costs what it costs at the end. So spreading gains only if a layer changes its degree with it, or
where one all-reduce less saves its latency. A dynamic program over slices of the gradient finds
both exactly; then the free time left by the size of a slice is filled to the byte.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .cost_model import CostModel, Linear
from .pipeline import DEGREES, LayerWork, plan_layer

NUM_SLICES = 256
"""Twice as many slices take four times as long: 0.1 s for 96 stages."""


@dataclass(frozen=True, slots=True)
class Option:
    """One way to run a stage, without any gradients."""

    degree: int
    seconds: float
    busy_s: float
    """Seconds of these in which the link between nodes works."""

    def seconds_with(self, gradients_s: float) -> float:
        """Return the time with an all-reduce next to it.

        It follows the last dispatch. So it takes the link's free time first, and the rest delays
        the combines (the simulation agrees: tests/parallel/test_gradient_partition.py).
        """
        return max(self.seconds, self.busy_s + gradients_s)


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of backward: an MoE layer, or the dense layers up to the next one."""

    options: tuple[Option, ...]
    new_bytes: int = 0
    """Dense gradients that exist when it ends; later stages may send them."""

    def best(self, gradients_s: float) -> Option:
        """Return the fastest option for an all-reduce of ``gradients_s``; the first of equals."""
        return min(self.options, key=lambda option: option.seconds_with(gradients_s))


@dataclass(frozen=True, slots=True)
class Partition:
    """Which stage sends how much."""

    bytes_by_stage: tuple[int, ...]
    degrees: tuple[int, ...]
    """The degree of each stage."""
    rest_bytes: int
    """Sent after the last stage, when nothing else runs."""
    seconds: float
    """All stages and the rest."""


def moe_stage(
    model: CostModel,
    work: LayerWork,
    forward_degree: int,
    new_bytes: int = 0,
    candidates: Sequence[int] = DEGREES,
) -> Stage:
    """Return the backward of an MoE layer whose forward ran with ``forward_degree``."""
    options = []
    for degree in candidates:
        calls = math.lcm(forward_degree, degree) // degree
        timeline = plan_layer(model, work, degree, backward=True, calls=calls)
        options.append(Option(degree, timeline.seconds, timeline.busy_s("inter")))
    return Stage(tuple(options), new_bytes)


def dense_stage(seconds: float, new_bytes: int) -> Stage:
    """Return the backward of dense layers, in which the link between nodes has nothing to do."""
    return Stage((Option(1, seconds, 0.0),), new_bytes)


def partition(
    stages: Sequence[Stage], all_reduce: Linear, num_slices: int = NUM_SLICES
) -> Partition:
    """Return the shares of the gradient that make backward shortest.

    ``stages`` are in the order of backward. A stage sends only what earlier stages have produced,
    and no byte is sent twice.
    """
    total = sum(stage.new_bytes for stage in stages)
    slice_bytes = max(1, -(-total // num_slices))
    count = -(-total // slice_bytes)
    times = [all_reduce.seconds(number * slice_bytes) for number in range(count + 1)]
    bounds = [min(number * slice_bytes, total) for number in range(count + 1)]
    cost = np.full(count + 1, np.inf)  # by slices sent so far
    cost[0] = 0.0
    choices, ready = [], 0
    for stage in stages:
        ready_slices = count if ready == total else ready // slice_bytes
        seconds = [stage.best(t).seconds_with(t) for t in times[: ready_slices + 1]]
        cost, choice = _spread(cost, seconds)
        choices.append(choice)
        ready += stage.new_bytes
    left = np.array([all_reduce.seconds(total - sent) for sent in bounds])
    sent = int(np.argmin(cost + left))
    ends = [bounds[sent]]
    for choice in reversed(choices):
        sent -= int(choice[sent])
        ends.append(bounds[sent])
    ends.reverse()
    return _filled(stages, all_reduce, [int(number) for number in np.diff(ends)])


def _spread(
    cost: npt.NDArray[np.float64], seconds: Sequence[float]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Add a stage that may send ``len(seconds) - 1`` slices or fewer by its end.

    Returns the smallest sums by slices sent so far, and how many of them this stage sends.
    """
    best = np.full_like(cost, np.inf)
    choice = np.zeros(len(cost), dtype=np.int64)
    most = len(seconds) - 1
    for number, stage_s in enumerate(seconds):
        candidate = cost[: most + 1 - number] + stage_s
        is_better = candidate < best[number : most + 1]
        best[number : most + 1][is_better] = candidate[is_better]
        choice[number : most + 1][is_better] = number
    return best, choice


def _filled(stages: Sequence[Stage], all_reduce: Linear, slices: Sequence[int]) -> Partition:
    """Return the partition that sends ``slices``, and more where that delays nothing.

    Whatever is sent early cannot be missing later: earlier stages have produced it already.
    """
    sent: list[int] = []
    degrees: list[int] = []
    seconds, ready = 0.0, 0
    for stage, number in zip(stages, slices, strict=True):
        option = stage.best(all_reduce.seconds(number))
        room = all_reduce.size(option.seconds - option.busy_s)
        sent.append(int(min(max(number, room), ready - sum(sent))))
        degrees.append(option.degree)
        seconds += option.seconds_with(all_reduce.seconds(sent[-1]))
        ready += stage.new_bytes
    rest = ready - sum(sent)
    return Partition(tuple(sent), tuple(degrees), rest, seconds + all_reduce.seconds(rest))
