"""A request of a better priority starts at once, in the place of worse ones, which go on later."""

import random

import pytest
from test_scheduler import Run, job, next_token


def run_of(*requests, num_blocks=40, places=4, rows=100):
    """Return a run after one step of some requests: name, prompt tokens, answer tokens, priority.

    No two texts begin alike.
    """
    run = Run(num_blocks, places, rows)
    jobs = [ask(run, *one) for one in requests]
    run.step()
    return run, jobs


def ask(run, name, num_prompt, num_tokens, priority):
    one = job(name, [1000 * len(name) + ord(name[0]) * 1000 + n for n in range(num_prompt)])
    one.priority = priority
    run.add(one, num_tokens)
    return one


def check_texts(run, *jobs):
    """Compare answers with those of the requests alone."""
    for one in jobs:
        text = one.ids[: one.num_prompt]
        for expected in run.ended[one.request_id]:
            assert next_token(text) == expected
            text.append(expected)


def test_one_of_worse_priority_gives_its_place_and_goes_on_later():
    run, (worse,) = run_of(("worse", 10, 20, 1), places=1)
    for _ in range(4):
        run.step()
    better = ask(run, "better", 10, 5, 0)
    run.step()
    assert better.blocks and not worse.blocks and run.num_preempted == 1
    assert list(run.finish()) == ["better", "worse"]
    assert run.num_preempted == 1
    check_texts(run, worse, better)


def test_those_of_worse_priority_give_their_blocks_the_last_first_and_no_more_than_needed():
    run, (first, second, third) = run_of(
        ("a", 14, 9, 1), ("b", 14, 9, 2), ("c", 14, 9, 2), num_blocks=16
    )
    better = ask(run, "better", 18, 2, 0)
    run.step()
    assert [bool(one.blocks) for one in (first, second, third, better)] == [1, 1, 0, 1]
    run.finish()
    check_texts(run, first, second, third, better)


def test_one_whose_blocks_are_not_needed_goes_on_though_it_is_the_last():
    run, (big, small) = run_of(("b", 20, 9, 3), ("c", 4, 9, 4), num_blocks=12)
    run.step()
    better = ask(run, "a", 28, 2, 0)  # it needs 7 blocks, and 4 are free: the 6 of the big one do
    run.step()
    assert [bool(one.blocks) for one in (big, small, better)] == [0, 1, 1]
    assert run.num_preempted == 1
    run.finish()
    check_texts(run, big, small, better)


def test_none_starts_before_a_better_one_that_has_just_given_way():
    run, (first,) = run_of(("b", 30, 9, 3), num_blocks=10)
    better, worse = ask(run, "a", 8, 2, 0), ask(run, "c", 4, 9, 5)
    run.step()
    assert [bool(one.blocks) for one in (first, better, worse)] == [0, 1, 0]
    assert list(run.finish()) == ["a", "b", "c"]
    check_texts(run, first, better, worse)


@pytest.mark.parametrize(("priority", "num_prompt"), [(1, 10), (0, 40)], ids=["equal", "too long"])
def test_none_gives_way_to_an_equal_one_or_where_it_would_not_be_enough(priority, num_prompt):
    run, (best, worse) = run_of(("best", 20, 9, 0), ("worse", 10, 30, 1), num_blocks=14, places=2)
    waiting = ask(run, "waiting", num_prompt, 3, priority)
    while best in run.jobs:
        assert worse.blocks and not waiting.blocks
        run.step()
    run.finish()
    check_texts(run, best, worse, waiting)


def test_blocks_that_others_share_are_not_counted_as_freed():
    run = Run(10, max_running=3, prompt_rows=100)
    prompt = list(range(17))
    run.add(job("best", prompt, priority=0), 6)
    run.step()
    sharing = job("sharing", [*prompt, 5], priority=2)
    run.add(sharing, 6)
    run.step()
    assert sharing.num_reused == 16
    better = ask(run, "better", 17, 2, 1)  # without the shared ones it lacks a block
    run.step()
    assert sharing.blocks and not better.blocks
    run.finish()
    check_texts(run, sharing, better)


def test_one_that_comes_back_generates_before_it_gives_way_again():
    """Whenever it has come back, a better one comes; reading again takes it several steps."""
    run, (worse,) = run_of(("worse", 30, 12, 1), places=1, rows=8)
    known, count = [], 0
    while worse in run.jobs:
        if worse.blocks and len(run.jobs) == 1:
            count += 1
            ask(run, "b" * count, 6, 2, 0)
        had = bool(worse.blocks)
        run.step()
        if had and not worse.blocks and worse in run.jobs:
            known.append(len(worse.ids))
        assert count < 50
    assert len(known) > 5 and known == sorted(set(known))
    run.finish()
    check_texts(run, worse)


@pytest.mark.parametrize("seed", range(6))
def test_the_best_priority_of_a_random_mix_never_waits_for_worse_ones(seed):
    """With prompts of one length, a waiting request may only be kept out by equal or better ones,
    or by those that have just come back."""
    chance = random.Random(seed)
    run, waited = Run(24, max_running=3, prompt_rows=8, chance=chance), 0
    for index in range(30):
        ask(run, chr(200 + index), 9, chance.randint(1, 6), chance.choice([0, 1, 2]))
        for _ in range(chance.randint(0, 3)):
            run.step()
            waiting = [one for one in run.jobs if not one.blocks]
            running = [one for one in run.jobs if one.blocks and not one.has_just_returned]
            if waiting and running:
                waited += 1
                best = min(one.priority for one in waiting)
                assert all(one.priority <= best for one in running)
    assert waited > 5
    run.finish()
