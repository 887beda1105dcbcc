"""Hints: whatever is predicted, the numbers are the resident model's, and the books are right."""

import os
import random
import time

import pytest
import torch

from moeyard.serving.experts.predictors.predictor import Hint
from moeyard.serving.experts.predictors.switch import AlwaysOn
from moeyard.serving.experts.predictors.table import facts_of, open_predictor
from moeyard.serving.loading import open_model

from small_model import NUM_EXPERTS, slots

LAYERS, EXPERTS = (0, 2), 6


class Guesses:
    """Hints that a function makes."""

    def __init__(self, guess):
        self._guess = guess

    def begin(self, forward):
        return self._guess(None)

    def see(self, layer, experts_NK):
        self.last = experts_NK

    def after_choice(self, layer, x_ND):
        return self._guess(layer)


def random_hints(seed):
    chance = random.Random(seed)

    def guess(layer):
        keys = [(layer, expert) for layer in LAYERS for expert in range(EXPERTS)]
        return [Hint(key, chance.random()) for key in chance.sample(keys, chance.randint(0, 12))]

    return guess


def everything(layer):
    return [Hint((layer, expert), 1.0) for layer in LAYERS for expert in range(EXPERTS)]


def sure_and_wrong(layer):
    """Name what the layer that has just chosen does not need any more."""
    return [Hint((layer or 0, expert), 1.0) for expert in range(EXPERTS)]


GUESSES = {
    **{f"random {seed}": random_hints(seed) for seed in range(3)},
    "everything": everything,
    "sure and wrong": sure_and_wrong,
}
KINDS = ("next_gates", "previous_layers", "activations", "previous_token")
SHORT = [
    *(("random 0", 1), ("random 1", 6), ("everything", 3)),
    *(("sure and wrong", 3), ("next_gates", 6)),
]
CASES = [
    pytest.param(guess, count, marks=() if (guess, count) in SHORT else pytest.mark.slow)
    for guess in (*GUESSES, *KINDS)
    for count in (12, 6, 3, 1)
]


def open_hinted(folder, count, predictor):
    model, store = open_model(folder, expert_memory=slots(count))
    if isinstance(predictor, str):
        predictor = open_predictor(predictor, model.decoder)
    store.predict(predictor, facts_of(model.config), AlwaysOn())
    return model, store


@pytest.fixture
def slow_disk(monkeypatch, reads_by_preadv):
    real, chance = os.preadv, random.Random(0)

    def slow(*arguments):
        time.sleep(chance.choice((0, 0, 0.0005)))
        return real(*arguments)

    monkeypatch.setattr(os, "preadv", slow)


@pytest.mark.parametrize(("guess", "count"), CASES)
def test_logits_are_the_resident_ones_whatever_is_hinted(model_folder, slow_disk, guess, count):
    resident, _ = open_model(model_folder)
    predictor = Guesses(GUESSES[guess]) if guess in GUESSES else guess
    model, store = open_hinted(model_folder, count, predictor)
    prompt = torch.randint(0, 257, (1, 9), generator=torch.Generator().manual_seed(7))
    expected = resident.generate(prompt, 16, temperature=0)
    assert torch.equal(model.generate(prompt, 16, temperature=0), expected)
    ids = torch.randint(0, 257, (2, 30), generator=torch.Generator().manual_seed(8))
    assert torch.equal(model(ids), resident(ids))

    store.close()
    store._filler.book_finished(wanted=())
    counts = store.counts()
    assert counts.resident + counts.free + counts.filling == count == store.num_slots
    assert counts.filling == 0 and counts.expected == counts.announced == 0
    unused = len(store.statistics._unused)
    for traffic in store.statistics.layers.values():
        unused += traffic.prefetch_useful + traffic.prefetch_late + traffic.prefetch_wasted
        assert traffic.prefetch_useful <= traffic.hits
    issued = sum(traffic.prefetch_issued for traffic in store.statistics.layers.values())
    assert issued == unused, "every read ahead is useful, late, wasted or not needed yet"
    assert issued or count == NUM_EXPERTS or guess in KINDS
