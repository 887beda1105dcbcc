"""Who gives its place or its blocks up to a waiting request of a better priority."""

from collections import Counter
from collections.abc import Sequence

from .blocks import BlockPool
from .jobs import Job


def who_gives_way(
    job: Job, known: Sequence[int], more: int, running: Sequence[Job], pool: BlockPool, places: int
) -> list[Job] | None:
    """Return the running requests that must wait so that ``job`` can start; None if none will do.

    ``job`` takes over the ``known`` blocks and needs ``more``. ``running`` is in order, and at most
    ``places`` may run. The last in the order give way first, and no more of them than needed. A
    request of equal priority never gives way. One that has come back stays until it has generated a
    token, so each return brings it on, however often better ones come.
    """
    chosen: list[Job] = []
    users: Counter[int] = Counter()
    freed: set[int] = set()
    for other in reversed(running):
        if other.priority <= job.priority:
            break
        if other.has_just_returned:
            continue
        chosen.append(other)
        for block in other.blocks:
            users[block] += 1
            if users[block] == pool.num_users(block):
                freed.add(block)
        left = len(running) - len(chosen)
        unused = pool.count_cached(known) + sum(block in freed for block in known)
        if left < places and more + unused + left <= pool.num_available + len(freed):
            return chosen
    return None
