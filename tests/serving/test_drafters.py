"""Drafters find what came before without a search; rows run where they pay."""

import itertools
import random

import pytest

from moeyard.moe.drafts.costs import StepCosts, share_rows
from moeyard.moe.drafts.drafter import Draft
from moeyard.moe.drafts.ngrams import LENGTHS, Ngrams
from moeyard.moe.drafts.suffixes import SHORTEST, Suffixes
from moeyard.moe.drafts.text import TextDrafts


def texts():
    """Random ids of two and of five kinds, repeats, and repeats with changes."""
    draw = random.Random(3)
    piece = [draw.randrange(50) for _ in range(30)]
    yield [draw.randrange(2) for _ in range(120)]
    yield [draw.randrange(5) for _ in range(200)]
    yield piece * 4
    yield [7] * 40
    yield [draw.randrange(50) if draw.random() < 0.1 else token for token in piece * 6]


def longest_match(ids):
    """Return the length of the longest end of ``ids`` that came before, by looking everywhere."""
    for length in range(len(ids) - 1, 0, -1):
        if any(ids[at : at + length] == ids[-length:] for at in range(len(ids) - length)):
            return length
    return 0


def followers(ids, length, count):
    """Return all that followed the last ``length`` ids, with the text repeating after its end."""
    for at in range(len(ids) - length):
        if ids[at : at + length] == ids[-length:]:
            going_on = list(ids)
            for step in range(count):
                going_on.append(going_on[at + length + step])
            yield tuple(going_on[len(ids) :])


@pytest.mark.parametrize("ids", list(texts()))
def test_suffixes_follow_the_longest_match(ids):
    drafter = Suffixes()
    for end, token in enumerate(ids, start=1):
        drafter.add([token])
        found, length = drafter.draft(6), longest_match(ids[:end])
        if length < SHORTEST:
            assert found == Draft(())
        else:
            assert found.match == length
            assert found.ids in set(followers(ids[:end], length, 6))


@pytest.mark.parametrize("ids", list(texts()))
def test_ngrams_follow_the_latest_place_of_the_longest_known_length(ids):
    drafter = Ngrams()
    for end, token in enumerate(ids, start=1):
        drafter.add([token])
        known = ids[:end]
        expected = Draft(())
        for length in LENGTHS:
            found = list(followers(known, length, 6))
            if found:
                expected = Draft(found[-1], length)
                break
        assert drafter.draft(6) == expected


def test_pieces_of_any_length_make_the_same_text():
    for ids in texts():
        for make in (Ngrams, Suffixes):
            whole, pieces = make(), make()
            whole.add(ids)
            for at in range(0, len(ids), 7):
                pieces.add(ids[at : at + 7])
            assert whole.draft(9) == pieces.draft(9)


class Fixed:
    """Always guesses the same."""

    def __init__(self, *ids):
        self._ids = ids

    def add(self, ids):
        pass

    def draft(self, count):
        return Draft(self._ids[:count], 5)


def test_chances_follow_what_came_and_count_no_id_after_a_wrong_one():
    drafts = TextDrafts(Fixed(1, 2, 3))
    assert drafts.guess(3) == [0.5, 0.25, 0.125]
    for _ in range(30):
        drafts.read([1, 2, 9])  # two right ones, one wrong
        chances = drafts.guess(3)
    assert chances[0] > 0.6 and chances[0] > chances[1] > chances[2]
    for _ in range(30):
        drafts.read([8, 2, 3])  # the first is wrong, so the others say nothing
        chances = drafts.guess(3)
    assert chances[0] < 0.02
    drafts.use(2)
    assert drafts.ids == (1, 2)
    drafts.drop()
    assert drafts.ids == ()


def test_costs_are_the_line_that_steps_lie_on():
    costs, draw = StepCosts(), random.Random(1)
    assert costs.per_row == 0
    for _ in range(200):
        rows = draw.randrange(1, 12)
        costs.add(rows, 0.004 + 0.001 * rows)
    assert costs.per_row == pytest.approx(0.001, rel=1e-6)
    assert costs.seconds(3) == pytest.approx(0.007, rel=1e-3)
    for _ in range(500):  # equal steps say nothing of the slope
        costs.add(2, 0.006)
    assert costs.per_row == pytest.approx(0.001, rel=1e-6)
    for _ in range(500):
        rows = draw.randrange(1, 12)
        costs.add(rows, 0.001 + 0.003 * rows)
    assert costs.per_row == pytest.approx(0.003, rel=1e-3)


@pytest.mark.parametrize("seed", range(20))
def test_no_other_rows_would_bring_more_tokens_per_second(seed):
    draw, costs = random.Random(seed), StepCosts()
    slope = draw.choice([0.0002, 0.001, 0.003])
    for rows in (1, 4, 9, 2, 6):
        costs.add(rows, 0.004 + slope * rows)
    chances = []
    for _ in range(3):
        each = [draw.random() for _ in range(draw.randrange(4))]
        chances.append(list(itertools.accumulate(each, lambda a, b: a * b)))

    def speed(counts):
        tokens = 3 + sum(sum(own[:n]) for own, n in zip(chances, counts, strict=True))
        return tokens / (costs.seconds(3) + costs.per_row * sum(counts))

    every = itertools.product(*(range(len(own) + 1) for own in chances))
    best = max(speed(counts) for counts in every if sum(counts) <= 5)
    counts = share_rows(chances, 3, costs, 5)
    assert sum(counts) <= 5
    assert speed(counts) == pytest.approx(best)
