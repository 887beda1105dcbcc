"""Plan in which parts of backward dense gradients travel, from steps in which they do not.

In the first steps all gradients are sent at the end. The clock then tells how long each MoE layer
and the dense layers below it take, how long the link between nodes has nothing to do meanwhile, and
which gradients exist. Then the plan is made (planning/gradient_partition.py). It takes turns with
sending every bucket at once, and the faster way stays.

L MoE layers, S steps.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..dense.gradient_queue import GradientQueue, Way
from ..experts.lane import Pending
from ..experts.pipelined import Degrees, PipelinedPath
from ..experts.stream_lane import AnyLane
from ..mesh import Mesh
from ..planning.cost_model import Linear, fit
from ..planning.gradient_partition import Option, Partition, Stage, dense_stage, partition
from ..planning.trials import Trials
from .layer import GRADIENT_BYTES
from .links import all_reduce_probe
from .measure import halvings, measure

WAYS: tuple[Way, ...] = ("at once", "planned")
UNMEASURED = 2
"""DDP orders its buckets anew after the first step, and the second one warms up."""
MEASURED = 3
"""Steps whose medians count."""
LEAST_BYTES = 1 << 10
"""The smallest sum that is measured, so that a line has its sizes."""
LIMIT_S = 5.0
"""For measuring the all-reduce."""


@dataclass(frozen=True, slots=True)
class _Moment:
    """When a lane had done its work so far, and what it had waited until then."""

    at_s: float
    idle_s: float


@dataclass(frozen=True, slots=True)
class _Turn:
    """The backward of an MoE layer."""

    began_s: float
    ready_bytes: int
    """Gradients that existed when it began."""
    dispatched: Pending[_Moment]
    combined: Pending[_Moment]


class GradientSlices:
    """Measures and plans for the queue of a run's dense engine; all ranks make the same calls.

    The plan must beat sending at once by more than noise. ``paths`` are those that MoE layers may
    use; they share nothing with other models.
    """

    def __init__(
        self,
        queue: GradientQueue,
        paths: Sequence[PipelinedPath],
        mesh: Mesh,
        device: torch.device,
        unmeasured: int = UNMEASURED,
        measured: int = MEASURED,
    ) -> None:
        self.partition: Partition | None = None
        """Of :attr:`stages`; None while steps are measured."""
        self.trials: Trials[Way] | None = None
        """Of the plan and of sending at once; None while steps are measured."""
        self.stages: list[Stage] = []
        """The dense layers above the last MoE layer, then that layer, the dense layers below it,
        and so on."""
        self._queue, self._mesh, self._device = queue, mesh, device
        self._unmeasured, self._measured = unmeasured, measured
        self._now: tuple[PipelinedPath, Degrees] | None = None
        """How the MoE layers of this step ran, and of the last one."""
        self._before: tuple[PipelinedPath, Degrees] | None = None
        self._seen = 0
        self._turns: list[_Turn] = []
        self._begun: tuple[float, Pending[_Moment]] | None = None
        self._steps: list[Tensor] = []
        self._line: Linear | None = None
        for path in paths:
            path.fill = partial(self._fill, path)

    def after_step(self) -> None:
        """Count a step; measure again if its MoE layers ran in another way than before."""
        if self._now != self._before:
            self._before, self._seen, self.partition = self._now, 0, None
            self.trials, self._queue.way = None, "at the end"
            self._steps.clear()
        elif self.partition is None:
            self._seen += 1
        if self.trials is not None:
            self.trials.note(self._queue.backward_s)
            self._queue.way = self.trials.current
        turns, self._turns = self._turns, []
        if self.partition is None and self._seen >= self._unmeasured and turns:
            self._steps.append(self._times(turns))
            if len(self._steps) == self._measured:
                self._plan()

    def record(self) -> dict[str, int]:
        """Return the bytes of the next step that travel at once, in MoE layers, between them and at
        the end."""
        way, total = self._queue.way, self._queue.queued_bytes
        if way != "planned" or self.partition is None:
            return {
                "at_once": total if way == "at once" else 0,
                "moe": 0,
                "dense": 0,
                "end": total if way == "at the end" else 0,
            }
        sent = self.partition.bytes_by_stage
        return {
            "at_once": 0,
            "moe": sum(sent[1::2]),
            "dense": sum(sent[2::2]),
            "end": self.partition.rest_bytes,
        }

    def _fill(self, path: PipelinedPath, lane: AnyLane) -> None:
        if self._queue.is_open:
            self._now = (path, path.degrees)
            if self.partition is None:
                self._note(lane)
        self._queue.send_planned(lane.submit)

    def _note(self, lane: AnyLane) -> None:
        moment = lane.submit(lambda: _Moment(time.perf_counter(), lane.idle_s))
        if self._begun is None:
            self._begun = (time.perf_counter(), moment)
            return
        began_s, dispatched = self._begun
        self._begun = None
        self._turns.append(_Turn(began_s, self._queue.queued_bytes, dispatched, moment))

    def _times(self, turns: Sequence[_Turn]) -> Tensor:
        """Return for each MoE layer its seconds, those in which its link waits, those of the dense
        layers below it, and the bytes that existed when it began: ``[4, L]``, fp64."""
        ends = [turn.combined.result() for turn in turns]
        next_began = [*(turn.began_s for turn in turns[1:]), self._queue.complete_at_s]
        rows = [
            [end.at_s - turn.began_s for turn, end in zip(turns, ends, strict=True)],
            [
                end.idle_s - turn.dispatched.result().idle_s
                for turn, end in zip(turns, ends, strict=True)
            ],
            [max(0.0, b - end.at_s) for b, end in zip(next_began, ends, strict=True)],
            [turn.ready_bytes for turn in turns],
        ]
        return torch.tensor(rows, dtype=torch.float64)

    def _plan(self) -> None:
        """Give the queue the best plan for what was measured."""
        times_S4L = torch.stack(self._steps)
        times_S4L[:, 3] *= -1  # the least that any rank had
        times_S4L = self._mesh.largest(times_S4L)
        moe_L, idle_L, dense_L, _ = times_S4L.median(dim=0).values.tolist()
        ready_L = (-times_S4L[:, 3].amax(dim=0)).long().tolist()
        total = self._queue.queued_bytes
        self.stages = [dense_stage(0.0, ready_L[0])]
        later = [*ready_L[1:], total]
        for moe_s, idle_s, dense_s, ready, then in zip(
            moe_L, idle_L, dense_L, ready_L, later, strict=True
        ):
            self.stages.append(Stage((Option(1, moe_s, max(0.0, moe_s - idle_s)),)))
            self.stages.append(dense_stage(dense_s, then - ready))
        self.partition = partition(self.stages, self._all_reduce_line(total))
        self._queue.plan = self.partition.bytes_by_stage[1:]
        self.trials = Trials(WAYS, self._mesh.largest)
        self._queue.way = self.trials.current

    def _all_reduce_line(self, total: int) -> Linear:
        if self._line is None:
            assert self._mesh.dp_group is not None
            sizes = halvings(min(max(total, LEAST_BYTES), GRADIENT_BYTES))
            probe = all_reduce_probe("gradients", self._mesh.dp_group, sizes, self._device)
            self._line = fit(measure([probe], self._mesh, self._device, LIMIT_S)["gradients"])
        return self._line
