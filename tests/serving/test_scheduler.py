"""The scheduler without a model: a block's content is what its writer had read up to there.

So a test sees whether a request would ever attend to another text than its own, or to rows whose
bits belong to other chunks.
"""

import random

import pytest

from moeyard.serving.engine.blocks import BlockPool
from moeyard.serving.engine.jobs import Job
from moeyard.serving.engine.prompt_shares import share_rows
from moeyard.serving.engine.scheduler import Scheduler

BLOCK = 4


def job(name, prompt, **options):
    return Job(name, list(prompt), len(prompt), **options)


def next_token(ids):
    """A text's next token: any rule that reads all of it will do."""
    return hash(tuple(ids)) % 50


class Run:
    """Plays the engine: keeps contents of blocks and checks each plan."""

    def __init__(self, num_blocks, max_running=4, prompt_rows=8, cancels=0.0, chance=None):
        self.pool = BlockPool(num_blocks)
        self.scheduler = Scheduler(self.pool, BLOCK, max_running, prompt_rows)
        self.content = [[None] * BLOCK for _ in range(num_blocks)]
        self.prompt_rows, self.cancels, self.chance = prompt_rows, cancels, chance
        self.limits, self.jobs, self.ended = {}, {}, {}
        self.num_preempted = self.num_forks = self.num_reused = self.num_rows = 0

    def add(self, one, max_tokens):
        assert self.scheduler.fits(one.num_prompt + max_tokens)
        self.limits[one], self.jobs[one] = max_tokens, None
        self.scheduler.add(one)

    def step(self):
        running = [one for one in self.jobs if one.blocks]
        going = {one for one in running if one.goes_by_rows}
        plan = self.scheduler.plan()
        self.num_preempted += len(plan.preempted)
        self.num_reused += sum(one.num_read for one in [*plan.started, *plan.returned])
        turns = dict(plan.turns)
        assert len(turns) == len(plan.turns)
        assert going - set(plan.preempted) <= set(turns), "one that generates was left out"
        read = sum(rows for one, rows in plan.turns if not one.goes_by_rows)
        assert read <= self.prompt_rows
        assert bool(turns) or not self.jobs, "nothing runs, but something waits"
        for one, rows in plan.turns:
            self._write(one, rows)
        for one, rows in plan.turns:
            if one not in self.jobs:
                continue  # it ended while another one was forked
            self.scheduler.has_read(one, rows)
            self._accept(one)
        if self.chance and self.jobs and self.chance.random() < self.cancels:
            self._end(self.chance.choice(list(self.jobs)))
        self._check_books()

    def _accept(self, one):
        if one.num_left:
            return
        followers = self.scheduler.followers(one) if len(one.ids) == one.num_prompt else []
        for follower in followers:
            copied = self.scheduler.fork(one, follower)
            if copied is not None:
                source, target = copied
                self.content[target] = list(self.content[source])
                self.num_forks += 1
                self._generate(follower)
        self._generate(one)

    def _generate(self, one):
        one.ids.append(next_token(one.ids))
        if len(one.ids) - one.num_prompt == self.limits[one]:
            self.ended[one.request_id] = one.ids[one.num_prompt :]
            self._end(one)

    def _end(self, one):
        self.scheduler.remove(one)
        del self.jobs[one]

    def _write(self, one, rows):
        """Check what is stored before these rows, then store them."""
        start = one.num_read
        assert rows > 0 and start + rows <= len(one.ids)
        assert start + rows <= len(one.blocks) * BLOCK, "rows without blocks"
        for position in range(start):
            assert self._at(one, position) == self._expected(one, position)
        for position in range(start, start + rows):
            chunk = (start, start + rows)
            if one.chunk is None:
                chunk = None
            block, place = divmod(position, BLOCK)
            self.content[one.blocks[block]][place] = self._text(one, position, chunk)
            assert self._at(one, position) == self._expected(one, position), "a wrong chunk"
        self.num_rows += rows

    def _at(self, one, position):
        return self.content[one.blocks[position // BLOCK]][position % BLOCK]

    def _expected(self, one, position):
        chunk = None
        if one.chunk is not None:
            start = position // one.chunk * one.chunk
            chunk = (start, min(start + one.chunk, one.num_prompt))
            if position >= one.num_prompt:
                chunk = (position, position + 1)
        return self._text(one, position, chunk)

    def _text(self, one, position, chunk):
        return one.salt, tuple(one.ids[: position + 1]), chunk

    def _check_books(self):
        held = [block for one in self.jobs for block in one.blocks]
        users = [held.count(block) for block in range(self.pool.num_blocks)]
        assert self.pool._num_users == users, "a request that ended or waits has blocks, or lacks"

    def finish(self, most_steps=3000):
        for _ in range(most_steps):
            if not self.jobs:
                assert self.pool.num_used == self.scheduler.num_running == 0
                assert self.scheduler.num_waiting == 0
                return self.ended
            self.step()
        raise AssertionError(f"{len(self.jobs)} requests never ended")


def random_jobs(chance, count, longest, chunk):
    """Texts that often begin alike, in groups, with salts and priorities."""
    texts = [[chance.randrange(50) for _ in range(longest)] for _ in range(3)]
    found = []
    for index in range(count):
        size = chance.choice([chance.randint(1, 4), chance.randint(1, longest)])
        salt = chance.choice([b"", b"", b"other", None])
        prompt = chance.choice(texts)[:size]
        if chance.random() < 0.3:
            prompt = [*prompt[:-1], 99]
        copies = chance.choice([1, 1, 1, 3])
        for copy in range(copies):
            one = job(
                f"{index}.{copy}",
                prompt,
                chunk=chunk,
                salt=salt,
                priority=chance.choice([0, 0, 0, -1, 2]),
                scores_prompt=chance.random() < 0.1,
                group=str(index) if copies > 1 else "",
            )
            found.append((one, chance.randint(1, 12)))
    return found


@pytest.mark.parametrize("chunk", [None, 4, 8, 6, 3], ids=lambda c: f"chunk{c}")
@pytest.mark.parametrize("seed", range(12))
def test_random_mixes_end_with_the_texts_of_requests_alone(seed, chunk):
    chance = random.Random(f"{seed} {chunk}")
    mixed = random_jobs(chance, 14, 30, chunk)
    run = Run(chance.randint(11, 24), chance.randint(1, 6), 8, 0.02 * (seed % 3), chance)
    waiting = list(mixed)
    while waiting:
        run.add(*waiting.pop(0))
        for _ in range(chance.choice([0, 0, 1, 3])):
            run.step()
    for name, answer in run.finish().items():
        one, limit = next(pair for pair in mixed if pair[0].request_id == name)
        text = one.ids[: one.num_prompt]
        for _ in range(limit):
            text.append(next_token(text))
        assert answer == text[one.num_prompt :]


@pytest.mark.parametrize("chunk", [None, 8], ids=lambda c: f"chunk{c}")
def test_the_mixes_preempt_fork_and_reuse(chunk):
    """Or the test before would prove little."""
    preempted = forks = reused = 0
    for seed in range(12):
        chance = random.Random(seed)
        run = Run(11, 5, 8)
        for pair in random_jobs(chance, 14, 30, chunk):
            run.add(*pair)
        run.finish()
        preempted += run.num_preempted
        forks += run.num_forks
        reused += run.num_reused
    assert preempted > 10 and forks > 10 and reused > 50


def test_an_answer_waits_for_the_blocks_of_its_prompt_and_needs_no_luck():
    run = Run(6, max_running=6)
    for index in range(6):
        run.add(job(str(index), range(index, index + 20)), 4)
    run.step()
    assert (run.scheduler.num_running, run.scheduler.num_waiting) == (1, 5)
    assert len(run.finish()) == 6


def test_what_can_never_fit_is_known_before():
    scheduler = Run(3).scheduler
    assert scheduler.fits(12) and not scheduler.fits(13)


def test_the_last_in_the_order_loses_its_blocks_and_the_first_never_does():
    run = Run(8, max_running=3, prompt_rows=100)
    jobs = [job("low", range(7), priority=5), job("old", range(20, 27)), job("new", range(40, 47))]
    for one in jobs:
        run.add(one, 16)
    lost = []
    while run.jobs:
        before = [one for one in run.jobs if one.blocks]
        run.step()
        lost += [one.request_id for one in before if one in run.jobs and not one.blocks]
    assert lost[0] == "low" and "old" not in lost
    assert list(run.ended) == ["old", "new", "low"]


def test_all_requests_of_a_group_share_their_prompt_and_copy_its_last_block():
    run = Run(40, max_running=4, prompt_rows=100)
    for index in range(3):
        run.add(job(str(index), range(10), group="g", salt=None), 9)
    run.step()
    assert run.num_rows == 10 and run.scheduler.num_running == 3
    blocks = [one.blocks for one in run.jobs]
    assert len({tuple(b[:2]) for b in blocks}) == 1 and len({b[2] for b in blocks}) == 3
    assert run.pool.num_used == 2 + 3
    run.finish()


def test_a_group_whose_reader_fails_is_read_by_the_next():
    run = Run(40, max_running=4, prompt_rows=4)
    jobs = [job(str(index), range(10), group="g", salt=None) for index in range(3)]
    for one in jobs:
        run.add(one, 2)
    run.step()
    assert [bool(one.blocks) for one in jobs] == [True, False, False]
    run._end(jobs[0])
    run.step()
    assert [bool(one.blocks) for one in jobs] == [False, True, False]
    assert len(run.finish()) == 2


@pytest.mark.parametrize(("chunk", "reused"), [(None, 20), (8, 16), (6, 12), (40, 0)])
def test_whole_blocks_are_taken_over_and_never_the_last_token(chunk, reused):
    run = Run(40, prompt_rows=100)
    run.add(job("a", range(24), chunk=chunk), 1)
    run.finish()
    second = job("b", range(24), chunk=chunk)
    run.add(second, 1)
    run.finish()
    assert second.num_reused == reused


def test_generated_tokens_are_taken_over_only_where_chunks_do_not_matter():
    for chunk, reused in ((None, 20), (8, 8)):
        run = Run(40, prompt_rows=100)
        first = job("a", range(8), chunk=chunk)
        run.add(first, 14)
        run.finish()
        second = job("b", [*first.ids, 7, 7], chunk=chunk)
        run.add(second, 1)
        run.finish()
        assert second.num_reused == reused


def test_other_salts_and_requests_that_score_their_prompt_take_nothing_over():
    run = Run(40, prompt_rows=100)
    run.add(job("a", range(24), salt=b"x"), 1)
    run.finish()
    others = [
        job("b", range(24), salt=b"y"),
        job("c", range(24), salt=None),
        job("d", range(24), salt=b"x", scores_prompt=True),
    ]
    for one in others:
        run.add(one, 1)
        run.finish()
    assert [one.num_reused for one in others] == [0, 0, 0]


def test_short_prompts_pass_long_ones_which_still_go_on_in_every_step():
    long, short = job("long", range(100)), job("short", range(5))
    assert dict(share_rows([long, short], 16)) == {long: 11, short: 5}
    many = [job(str(n), range(100)) for n in range(3)]
    assert sorted(rows for _, rows in share_rows(many, 16)) == [5, 5, 6]


def test_a_better_priority_reads_its_prompt_first():
    first, second = job("first", range(30)), job("second", range(30), priority=-1)
    assert dict(share_rows([first, second], 16)) == {second: 16}
    assert dict(share_rows([first, second], 40)) == {second: 30, first: 10}


def test_requests_with_fixed_chunks_take_turns():
    run = Run(100, max_running=3, prompt_rows=8)
    for name in "abc":
        run.add(job(name, range(32), chunk=8), 1)
    served = []
    while run.jobs:
        before = {one: one.num_read for one in run.jobs}
        run.step()
        served += [one.request_id for one, read in before.items() if one.num_read > read]
    assert served[:6] == ["a", "b", "c", "a", "b", "c"]
