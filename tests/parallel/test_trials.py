"""Candidates take turns in real steps, and the fastest one stays."""

import pytest
import torch

from moeyard.parallel.planning.trials import Trials

SECONDS = {"slow": 3.0, "fast": 1.0, "noisy": 2.0}


def same(seconds):
    return seconds


def run(trials, seconds_of, steps):
    tried = []
    for step in range(steps):
        tried.append(trials.current)
        trials.note(seconds_of(trials.current, step))
    return tried


def test_candidates_take_turns_and_the_fastest_stays():
    trials = Trials(list(SECONDS), same, steps=3)
    tried = run(trials, lambda name, step: SECONDS[name], 8)
    assert tried == [*SECONDS, *SECONDS, "slow", "fast"] and trials.best is None
    assert run(trials, lambda name, step: SECONDS[name], 3) == ["noisy", "fast", "fast"]
    assert trials.best == "fast"


def test_one_disturbed_step_does_not_decide():
    trials = Trials(list(SECONDS), same, steps=3)
    run(trials, lambda name, step: 100.0 if step == 4 else SECONDS[name], 9)
    assert trials.best == "fast"


def test_the_slowest_rank_decides():
    """Another rank takes long with what is fast here."""
    other = torch.tensor([[1.0, 9.0, 1.5]] * 3, dtype=torch.float64)
    trials = Trials(list(SECONDS), lambda seconds: seconds.maximum(other), steps=3)
    run(trials, lambda name, step: SECONDS[name], 9)
    assert trials.best == "noisy"


def test_the_first_stays_unless_another_is_clearly_faster():
    seconds = {"plain": 1.0, "hardly": 0.96, "slower": 1.5}
    trials = Trials(list(seconds), same, steps=1)
    run(trials, lambda name, step: seconds[name], 3)
    assert trials.best == "plain"


@pytest.mark.parametrize("steps", [0, 5])
def test_a_single_candidate_is_not_tried(steps):
    trials = Trials(["only"], same)
    assert run(trials, lambda name, step: 1.0, steps) == ["only"] * steps
    assert trials.best == "only"
