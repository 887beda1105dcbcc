"""How a step's rows are divided between the requests that read their prompts."""

from collections.abc import Sequence
from itertools import groupby

from .jobs import Job


def share_rows(jobs: Sequence[Job], budget: int) -> list[tuple[Job, int]]:
    """Return how many rows each request reads in a step, at most ``budget`` together.

    Requests of the best priority come first. Those of one priority get equal parts, and what some
    do not need goes to the others: a short prompt is read at once, and a long one is never put off
    for short ones. A request whose chunks have fixed ends gets a whole chunk or nothing. The one
    that has waited longest is asked first, so its chunk fits.
    """
    shares: list[tuple[Job, int]] = []
    for _, same in groupby(sorted(jobs, key=lambda job: job.priority), lambda job: job.priority):
        found = _share_equally(sorted(same, key=lambda job: (job.last_turn, job.rank)), budget)
        budget -= sum(found.values())
        shares += found.items()
    return shares


def _share_equally(jobs: list[Job], budget: int) -> dict[Job, int]:
    shares: dict[Job, int] = {}
    part, left = max(1, budget // len(jobs)), budget
    for job in jobs:
        rows = min(job.next_chunk, part) if job.chunk is None else job.next_chunk
        if rows <= left:
            shares[job] = rows
            left -= rows
    for job in jobs:
        if job in shares and job.chunk is None:
            more = min(job.next_chunk - shares[job], left)
            shares[job] += more
            left -= more
    return shares
