"""Who gives its place or its blocks up to a waiting request of a better priority."""

from collections import Counter
from collections.abc import Sequence

from .blocks import BlockPool
from .jobs import Job


class _Choice:
    """Requests that would give way, and the blocks that would then be free."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._users: Counter[int] = Counter()
        self.jobs: list[Job] = []
        self.freed: set[int] = set()

    def add(self, job: Job) -> None:
        self.jobs.append(job)
        for block in job.blocks:
            self._users[block] += 1
            if self._users[block] == self._pool.num_users(block):
                self.freed.add(block)

    def drop(self, job: Job) -> None:
        self.jobs.remove(job)
        for block in job.blocks:
            self._users[block] -= 1
            self.freed.discard(block)


def who_gives_way(
    job: Job, known: Sequence[int], more: int, running: Sequence[Job], pool: BlockPool, places: int
) -> list[Job] | None:
    """Return the running requests that must wait so that ``job`` can start; None if none will do.

    ``job`` takes over the ``known`` blocks and needs ``more``. ``running`` is in order, and at most
    ``places`` may run. The last in the order give way first, but none whose place and blocks are
    not needed besides those of the others. A request of equal priority never gives way. One that
    has come back stays until it has generated a token, so each return brings it on, however often
    better ones come.
    """
    choice = _Choice(pool)
    num_cached = pool.count_cached(known)

    def is_enough() -> bool:
        left = len(running) - len(choice.jobs)
        unused = num_cached + sum(block in choice.freed for block in known)
        return left < places and more + unused + left <= pool.num_available + len(choice.freed)

    for other in reversed(running):
        if other.priority <= job.priority:
            return None
        if other.has_just_returned:
            continue
        choice.add(other)
        if is_enough():
            break
    else:
        return None
    for other in list(reversed(choice.jobs)):  # the best one first: it is the least to be sent away
        choice.drop(other)
        if not is_enough():
            choice.add(other)
    return choice.jobs
