"""The schedule of one MoE layer in chunks, and the degrees that make it shortest.

FSMoE (Pan et al., ASPLOS 2025): the rows of a layer are cut into r chunks, r being the degree. Each
chunk is dispatched (between nodes), gathered (inside the node), computed, scattered (inside the
node) and combined (between nodes). Chunks overlap, because these steps use three resources.

The paper minimises four closed forms with SLSQP and rounds the result. Here every degree that may
be chosen is simulated: exact, for a handful of degrees faster, and the same for links and chunks
that the closed forms do not cover.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .cost_model import CostModel
from .schedule import Task, Timeline, simulate

DEGREES = (1, 2, 4, 8)
"""FSMoE's code chooses among these as well."""


@dataclass(frozen=True, slots=True)
class ChunkTimes:
    """Seconds of one chunk on each resource."""

    dispatch: float
    gather: float
    experts: float
    scatter: float
    combine: float


@dataclass(frozen=True, slots=True)
class LayerWork:
    """What a rank moves and computes in one direction of a layer, all chunks together.

    For unequal loads these are the numbers of the busiest rank, which the others wait for.
    """

    sent_bytes: float
    """Dispatched over the link between nodes, and again combined."""
    rows: float
    """Routed rows that the experts here compute."""
    node_bytes: float = 0.0
    """Gathered inside the node, and again scattered; 0 with one level."""
    beside_s: float = 0.0
    """Seconds of a shared expert, forward."""


@dataclass(frozen=True, slots=True)
class Degrees:
    """Degrees, and the seconds that they are expected to take."""

    forward: int
    backward: int
    forward_s: float
    backward_s: float

    @property
    def seconds(self) -> float:
        """Both directions."""
        return self.forward_s + self.backward_s

    @property
    def is_whole(self) -> bool:
        """Whether rows are not cut."""
        return self.forward == self.backward == 1


def layer_tasks(
    chunks: Sequence[ChunkTimes], gradients_s: Sequence[float] = (), beside_s: float = 0.0
) -> list[Task]:
    """Return the tasks of a layer in FSMoE's order.

    All dispatches come first, and with them the gathers. ``gradients_s``, slices of an all-reduce
    that is not part of the layer, follow the last dispatch. The combines come last. The shared
    expert, which needs no rows from elsewhere, is computed first.
    """
    count = len(chunks)
    tasks: list[Task] = []
    if beside_s > 0:
        tasks.append(Task("beside", 0, "compute", beside_s))
    dispatch = len(tasks)
    tasks += [Task("dispatch", i, "inter", chunk.dispatch) for i, chunk in enumerate(chunks)]
    tasks += [Task("gradients", i, "inter", seconds) for i, seconds in enumerate(gradients_s)]
    gather = len(tasks)
    tasks += [Task("gather", i, "intra", c.gather, (dispatch + i,)) for i, c in enumerate(chunks)]
    experts = len(tasks)
    tasks += [Task("experts", i, "compute", c.experts, (gather + i,)) for i, c in enumerate(chunks)]
    scatter = experts + count
    tasks += [Task("scatter", i, "intra", c.scatter, (experts + i,)) for i, c in enumerate(chunks)]
    tasks += [Task("combine", i, "inter", c.combine, (scatter + i,)) for i, c in enumerate(chunks)]
    return tasks


def plan_layer(
    model: CostModel,
    work: LayerWork,
    degree: int,
    *,
    backward: bool = False,
    calls: int = 1,
    gradients_s: Sequence[float] = (),
) -> Timeline:
    """Return the expected timeline of a layer in ``degree`` equal chunks.

    Experts compute each chunk in ``calls`` pieces. The shared expert's backward takes twice the
    time of its forward.
    """
    line = model.experts_backward if backward else model.experts
    chunk = ChunkTimes(
        dispatch=model.dispatch.seconds(work.sent_bytes / degree),
        gather=model.gather.seconds(work.node_bytes / degree),
        experts=calls * line.seconds(work.rows / (degree * calls)),
        scatter=model.scatter.seconds(work.node_bytes / degree),
        combine=model.combine.seconds(work.sent_bytes / degree),
    )
    beside_s = work.beside_s * (2 if backward else 1)
    return simulate(layer_tasks([chunk] * degree, gradients_s, beside_s), model.contention)


def ranked_degrees(
    model: CostModel, work: LayerWork, candidates: Sequence[int] = DEGREES
) -> list[Degrees]:
    """Return the degrees of forward and backward, those with the smallest sum of seconds first.

    Both directions share the pieces that experts compute: the least common multiple of the two
    degrees. So pairs are tried. Between equals, smaller degrees come first.
    """
    pairs = [(forward, backward) for forward in candidates for backward in candidates]
    found = [_priced(model, work, *pair) for pair in pairs]
    return sorted(found, key=lambda d: (d.seconds, d.forward + d.backward))


def _priced(model: CostModel, work: LayerWork, forward: int, backward: int) -> Degrees:
    pieces = math.lcm(forward, backward)
    there = plan_layer(model, work, forward, calls=pieces // forward)
    back = plan_layer(model, work, backward, backward=True, calls=pieces // backward)
    return Degrees(forward, backward, there.seconds, back.seconds)
