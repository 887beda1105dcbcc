"""When dense parameters and gradients travel, and how much of that a step waits for.

Computation and links run next to each other. A stage of a step has seconds in which the links wait.
What was asked for earlier travels in these; what is left over goes on in the next stage, and what a
stage needs before it can begin is waited for.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ..planning.cost_model import Linear

BUCKET_BYTES = 25 * 2**20
"""DDP sums gradients in buckets of this size (torch's default)."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of a forward or a backward, in the order of time."""

    seconds: float
    link_s: float = 0.0
    """Of these, seconds in which the links carry rows of experts."""
    parameters: int = 0
    """Dense parameters that it computes with."""

    @property
    def free_s(self) -> float:
        """Seconds in which something else can travel."""
        return max(0.0, self.seconds - self.link_s)


@dataclass(frozen=True, slots=True)
class Waiting:
    """What dense parameters and gradients add to a step."""

    exposed_s: float
    """Seconds in which nothing is computed."""
    hidden_s: float
    """Seconds of travel next to the computation."""
    contention: float = 0.0

    @property
    def seconds(self) -> float:
        """What a step takes longer: links and computation disturb each other."""
        return self.exposed_s + self.contention * self.hidden_s


def all_reduced(
    stages: Sequence[Stage], line: Linear, width: int, contention: float = 0.0
) -> Waiting:
    """Return what DDP's sums add to a backward: a bucket travels as soon as it is full.

    ``line`` is the all-reduce, by bytes, and ``width`` the bytes of a gradient. What has no time
    during backward is sent at its end.
    """
    ready = left_s = hidden_s = 0.0
    for stage in stages:
        sent_s = min(left_s, stage.free_s)
        left_s -= sent_s
        hidden_s += sent_s
        ready += stage.parameters * width
        full = ready // BUCKET_BYTES
        left_s += full * line.seconds(BUCKET_BYTES)
        ready -= full * BUCKET_BYTES
    return Waiting(left_s + line.seconds(ready), hidden_s, contention)


@dataclass(frozen=True, slots=True)
class Sharded:
    """FSDP: each layer is a unit that is gathered before it computes (parallel/dense/fsdp.py)."""

    gather: Linear
    """By the bytes of the whole unit."""
    scatter: Linear
    """The sum whose parts stay on their ranks."""
    item_bytes: int
    """Of a parameter when it is gathered."""
    wide_bytes: int
    """Of a gradient."""
    overlaps: bool
    """Whether the next unit is gathered while one computes, and gradients travel meanwhile."""
    contention: float = 0.0

    def forward(self, stages: Sequence[Stage], root: int) -> Waiting:
        """Return what gathers add to a forward; ``root`` parameters are gathered first."""
        return self._wait(stages, self._gather_s(root), sums=False)

    def backward(self, stages: Sequence[Stage], root: int, sums: bool) -> Waiting:
        """Return what gathers add to a backward, and the sums of gradients if it ``sums``.

        The root is still there, and its gradients are the last to travel.
        """
        waiting = self._wait(stages, 0.0, sums)
        last_s = self._scatter_s(root) if sums else 0.0
        return Waiting(waiting.exposed_s + last_s, waiting.hidden_s, self.contention)

    def _wait(self, stages: Sequence[Stage], exposed_s: float, sums: bool) -> Waiting:
        left_s = hidden_s = 0.0
        following = [*stages[1:], Stage(0.0)]
        if stages:
            exposed_s += self._gather_s(stages[0].parameters)
        for stage, after in zip(stages, following, strict=True):
            free_s = stage.free_s if self.overlaps else 0.0
            gather_s = self._gather_s(after.parameters)
            in_time_s = min(gather_s, free_s)
            exposed_s += gather_s - in_time_s
            sent_s = min(left_s, free_s - in_time_s)
            left_s -= sent_s
            hidden_s += in_time_s + sent_s
            if sums:
                left_s += self._scatter_s(stage.parameters)
        return Waiting(exposed_s + left_s, hidden_s, self.contention)

    def _gather_s(self, parameters: float) -> float:
        return self.gather.seconds(parameters * self.item_bytes)

    def _scatter_s(self, parameters: float) -> float:
        return self.scatter.seconds(parameters * self.wide_bytes)
