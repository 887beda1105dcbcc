"""Time operations at a few sizes on all ranks together.

A collective takes as long as its slowest rank, so every time is the largest of all ranks. All ranks
return the same numbers, fit the same lines and decide alike.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from ...progress import Progress
from ..mesh import Mesh
from ..planning.cost_model import Operation, Sample
from ..watch.pulse import pulse

Run = Callable[[], object]
REPEATS = 5
"""As FSMoE; their median counts."""
MIN_SIZES = 2
"""What a line needs, however slow the links are."""


@dataclass(frozen=True, slots=True)
class Trial:
    """An operation of one size, ready to run."""

    size: float
    """In the unit of the cost model; the largest of all ranks counts."""
    run: Run
    before: Run | None = None
    """What each run needs and is not timed."""


@dataclass(frozen=True, slots=True)
class Probe:
    """How to measure an operation."""

    operation: Operation
    amounts: Sequence[int]
    """What :attr:`prepare` is called with, rising; the same on all ranks."""
    prepare: Callable[[int], Trial]


def halvings(largest: int, count: int = 5) -> list[int]:
    """Return up to ``count`` rising amounts, each twice the one before, up to ``largest``.

    So the sizes of chunks are among the measured ones, for degrees up to ``2 ** (count - 1)``.
    """
    return sorted({max(1, largest >> power) for power in range(count)})


def measure(
    probes: Sequence[Probe], mesh: Mesh, device: torch.device, limit_s: float = 10.0
) -> dict[Operation, list[Sample]]:
    """Return the samples of all probes, the same on every rank; every rank must call it.

    It takes about ``limit_s`` at most: a probe whose share of it is used up leaves out its larger
    sizes, from the third on. A rank that is lost ends it as it ends any collective, at the latest
    after the time limit of the group.
    """
    samples: dict[Operation, list[Sample]] = {}
    total = sum(len(probe.amounts) for probe in probes)
    is_shown = mesh.rank == 0
    with Progress("measuring links and experts", total) if is_shown else nullcontext() as progress:
        for probe in probes:
            pulse.begin(f"measuring the time of {probe.operation}")
            found, used_s = samples.setdefault(probe.operation, []), 0.0
            for done, amount in enumerate(probe.amounts):
                if done < MIN_SIZES or used_s < limit_s / len(probes):
                    size, elapsed_s, *times_s = slowest(_repeat(probe, amount, mesh, device), mesh)
                    used_s += elapsed_s
                    found += [(size, seconds) for seconds in times_s]
                if progress is not None:
                    progress.advance()
    return samples


def _repeat(probe: Probe, amount: int, mesh: Mesh, device: torch.device) -> list[float]:
    """Return the size, the seconds of the whole measurement, and those of each repeat."""
    began = time.perf_counter()
    trial = probe.prepare(amount)
    times_s = []
    for _ in range(1 + REPEATS):
        if trial.before is not None:
            trial.before()
        mesh.barrier()
        times_s.append(timed(trial.run, device))
    return [trial.size, time.perf_counter() - began, *times_s[1:]]  # the first run warms up


def timed(run: Run, device: torch.device) -> float:
    """Return the seconds of a call, on a GPU those of the work that it started."""
    if device.type != "cuda":
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def slowest(numbers: list[float], mesh: Mesh) -> list[float]:
    """Return the largest of all ranks for each number; every rank must call it."""
    found: list[float] = mesh.largest(torch.tensor(numbers, dtype=torch.float64)).tolist()
    return found
