"""Which requests run, what each reads in a step, and who has which blocks. No tensors, no model.

Requests have an order: by priority, then by arrival. Nothing that happens here changes an answer.
"""

from bisect import insort
from dataclasses import dataclass, field
from math import lcm

from .blocks import BlockPool
from .giving_way import who_gives_way
from .jobs import Job
from .prompt_shares import share_rows


@dataclass(slots=True)
class Plan:
    """What one step does."""

    turns: list[tuple[Job, int]] = field(default_factory=list)
    """Requests and how many of their tokens are read now."""
    started: list[Job] = field(default_factory=list)
    """Requests that have got their first blocks, with ``num_read`` tokens in them already."""
    returned: list[Job] = field(default_factory=list)
    """Requests that have got blocks again."""
    preempted: list[Job] = field(default_factory=list)
    """Requests that have lost their blocks and wait; they will read all their tokens again."""


class Scheduler:
    """Requests that wait and requests that run, over one pool of blocks."""

    def __init__(self, pool: BlockPool, block: int, max_running: int, prompt_rows: int) -> None:
        self.pool = pool
        self._block = block
        self._max_running = max_running
        self._prompt_rows = prompt_rows
        self._waiting: list[Job] = []
        self._running: list[Job] = []
        self._num_added = 0
        self._num_plans = 0

    @property
    def num_waiting(self) -> int:
        """Requests without blocks."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests with blocks."""
        return len(self._running)

    def fits(self, num_tokens: int) -> bool:
        """Say whether a text of this length has room when it is alone."""
        return self._count(num_tokens) <= self.pool.num_blocks

    def add(self, job: Job) -> None:
        """Let a request wait for its turn; it must fit at its greatest length."""
        job.order = self._num_added
        self._num_added += 1
        insort(self._waiting, job, key=_rank)

    def remove(self, job: Job) -> None:
        """Drop a request, wherever it is; its blocks are available at once."""
        if job in self._running:
            self._running.remove(job)
            self._give_back(job)
        elif job in self._waiting:
            self._waiting.remove(job)

    def plan(self) -> Plan:
        """Decide what the next step does.

        All requests that generate go on by one token. Then those that read their prompts share
        ``prompt_rows`` rows.
        """
        plan = Plan()
        self._num_plans += 1
        self._grow(plan)
        if not plan.preempted:  # what was just sent away would only come back
            self._start(plan)
        plan.turns = [(job, 1) for job in self._running if job.goes_by_rows]
        readers = [job for job in self._running if not job.goes_by_rows]
        for job, rows in share_rows(readers, self._prompt_rows):
            job.last_turn = self._num_plans
            plan.turns.append((job, rows))
        return plan

    def has_read(self, job: Job, num_rows: int) -> None:
        """Take note that a request's next tokens have been read; full blocks can be found now."""
        job.num_read += num_rows
        unit = self._unit(job)
        first, end = job.num_published, min(job.num_read, self._most_reusable(job)) // unit
        if job.salt is None or end <= first:
            return
        names = job.names(first, end, unit, self._block)
        start = first * unit // self._block
        for block, name in zip(job.blocks[start : start + len(names)], names, strict=True):
            self.pool.publish(block, name)
        job.num_published = end

    def followers(self, leader: Job) -> list[Job]:
        """Return the waiting requests that want the prompt which ``leader`` has just read."""
        if not leader.group:
            return []
        return [job for job in self._waiting if job.group == leader.group and not job.has_begun]

    def fork(self, leader: Job, job: Job) -> tuple[int, int] | None:
        """Start a waiting request from the prompt that ``leader`` has read, if there is room.

        They share the prompt's full blocks. Returns the last block of both, the second of which
        must become a copy of the first; they are equal where the prompt ends with its block.
        """
        full, rest = divmod(job.num_prompt, self._block)
        needed = 1 if rest else 0
        has_place = len(self._running) < self._max_running
        if not has_place or needed + len(self._running) > self.pool.num_available:
            return None
        self._waiting.remove(job)
        job.blocks = leader.blocks[:full]
        self.pool.share(job.blocks)
        job.blocks += self.pool.take(needed)
        job.num_read, job.num_published = job.num_prompt, leader.num_published
        job.num_reused = leader.num_reused
        job.salt = None if leader.salt is None else job.salt  # mixed blocks stay their own
        insort(self._running, job, key=_rank)
        last = (job.num_prompt - 1) // self._block
        return leader.blocks[last], job.blocks[last]

    def extend(self, job: Job, num_rows: int) -> int:
        """Give a request that generates blocks for rows after its next one, if they are free.

        Returns for how many of ``num_rows`` it has room. No other request loses a block.
        """
        needed = self._count(job.num_read + 1 + num_rows) - len(job.blocks)
        more = min(max(0, needed), max(0, self.pool.num_available - len(self._running)))
        job.blocks += self.pool.take(more)
        return min(num_rows, len(job.blocks) * self._block - job.num_read - 1)

    def _grow(self, plan: Plan) -> None:
        """Give a block to each request that generates and has filled its last one.

        When there is none, the request that comes last in the order loses its blocks. The first
        one never does, so it ends, whatever the budget.
        """
        for job in list(self._running):
            if not job.goes_by_rows or len(job.blocks) >= self._count(job.num_read + 1):
                continue
            while job in self._running and not self.pool.num_available:
                self._preempt(self._running[-1], plan)
            if job in self._running:
                job.blocks += self.pool.take(1)

    def _start(self, plan: Plan) -> None:
        """Give blocks to the requests that wait, in their order, up to the first without room.

        Requests of worse priority give way to it, if that is enough. None that is behind one of
        those in the order starts before it.
        """
        for job in list(self._waiting):
            if any(other.rank < job.rank for other in plan.preempted):
                return
            is_full = len(self._running) == self._max_running
            if is_full and self._running[-1].priority <= job.priority:
                return
            if self._is_read_by_another(job):
                continue
            if not self._has_room(job, plan):
                return
            self._waiting.remove(job)
            insort(self._running, job, key=_rank)
            if job.num_reused is None:
                job.num_reused = job.num_read
                plan.started.append(job)
            else:
                plan.returned.append(job)

    def _has_room(self, job: Job, plan: Plan) -> bool:
        """Give a request blocks for all its tokens, if there is a place and enough of them.

        A block for each request that runs must be left: without it, they would soon take back what
        this one gets.
        """
        known = self._known(job)
        more = self._count(len(job.ids)) - len(known)
        needed = more + self.pool.count_cached(known) + len(self._running)
        if len(self._running) == self._max_running or needed > self.pool.num_available:
            giving_way = who_gives_way(
                job, known, more, self._running, self.pool, self._max_running
            )
            if giving_way is None:
                return False
            for other in giving_way:
                self._preempt(other, plan)
        self.pool.share(known)
        job.blocks = known + self.pool.take(more)
        job.num_read = len(known) * self._block
        job.num_published = job.num_read // self._unit(job)
        return True

    def _known(self, job: Job) -> list[int]:
        """Return the blocks that a request can take over, never that of its last token: the model
        must read that one to say what follows."""
        if job.salt is None or (job.scores_prompt and not job.has_begun):
            return []
        unit = self._unit(job)
        most = min(len(job.ids) - 1, self._most_reusable(job))
        found = self.pool.find(job.names(0, most // unit, unit, self._block))
        return found[: len(found) * self._block // unit * unit // self._block]

    def _is_read_by_another(self, job: Job) -> bool:
        if not job.group or job.has_begun:
            return False
        return any(other.group == job.group and other.reads_prompt for other in self._running)

    def _unit(self, job: Job) -> int:
        """Return how many positions can be taken over together."""
        return self._block if job.chunk is None else lcm(self._block, job.chunk)

    def _most_reusable(self, job: Job) -> int:
        """Return how many tokens may be in blocks that others take over.

        Where bits depend on the chunk, another text would read this one's generated tokens in
        other chunks.
        """
        return len(job.ids) if job.chunk is None else job.num_prompt

    def _count(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block)

    def _preempt(self, job: Job, plan: Plan) -> None:
        """Take a running request's blocks; it waits for its turn again."""
        self._running.remove(job)
        self._give_back(job)
        job.num_known_when_lost = len(job.ids)
        insort(self._waiting, job, key=_rank)
        plan.preempted.append(job)

    def _give_back(self, job: Job) -> None:
        self.pool.give_back(job.blocks)
        job.blocks, job.num_read, job.num_published = [], 0, 0


def _rank(job: Job) -> tuple[int, int]:
    return job.rank
