"""How much links and experts disturb each other when both work.

On a CPU, a message takes time of the cores that experts compute with. On a GPU, its kernels take
memory bandwidth. FSMoE's model has no such term.
"""

from statistics import median

import torch

from ..experts.stream_lane import open_lane
from ..mesh import Mesh
from .measure import REPEATS, Run, slowest, timed

MOST_CALLS = 16
"""Calls of the shorter operation next to one of the longer."""


def measure_contention(
    link: Run, link_s: float, experts: Run, experts_s: float, mesh: Mesh, device: torch.device
) -> float:
    """Return how much longer both take while they run at the same time; every rank must call it.

    ``link_s`` and ``experts_s`` are about what each takes alone, the same on all ranks: the shorter
    one is repeated until it takes as long as the other. 0 means that they do not disturb each
    other, and 1 that they might as well take turns. Above 1 it is worse than turns.
    """
    ratio = link_s / experts_s
    link = _repeated(link, _times(1 / ratio))
    experts = _repeated(experts, _times(ratio))
    lane = open_lane("contention")

    def both() -> None:
        sent = lane.submit(link)
        experts()
        sent.result()

    times_s: list[list[float]] = []
    for _ in range(1 + REPEATS):
        found = []
        for run in (lambda: lane.run(link), experts, both):
            mesh.barrier()
            found.append(timed(run, device))
        times_s.append(slowest(found, mesh))
    alone_s, computing_s, both_s = (median(column) for column in zip(*times_s[1:], strict=True))
    return max(0.0, (both_s - max(alone_s, computing_s)) / min(alone_s, computing_s))


def _times(ratio: float) -> int:
    return min(max(1, round(ratio)), MOST_CALLS)


def _repeated(run: Run, times: int) -> Run:
    def repeated() -> None:
        for _ in range(times):
            run()

    return repeated
