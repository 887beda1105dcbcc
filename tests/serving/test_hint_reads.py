"""What hints may do: which reads they begin, what they may put out, what is dropped, and counts."""

import threading
import time
from collections import deque

import numpy as np
import pytest

from moeyard.moe.folders.folder import ModelFolder
from moeyard.moe.routes.rows import Phase
from moeyard.serving.experts.forwards import Forward
from moeyard.serving.experts.predictors.admission import (
    SMALLEST_GAIN,
    Calibration,
    Regret,
    Windows,
    bucket_of,
    gain_of,
)
from moeyard.serving.experts.predictors.predictor import Hint, PredictorFacts
from moeyard.serving.experts.predictors.switch import AlwaysOn
from moeyard.serving.experts.read_ahead import Choice
from moeyard.serving.experts.reads import DroppedError, Read

from small_model import small_store

pytestmark = pytest.mark.usefixtures("reading_path")

FACTS = PredictorFacts((0, 2), 6, 2, "none")
ONE_ROW = Forward((0,), (Phase.DECODE,), (1,))


class Scripted:
    """Says what a test has written down for each layer."""

    def __init__(self, said):
        self._said = said

    def begin(self, forward):
        return self._said.get(None, [])

    def see(self, layer, experts_NK):
        pass

    def after_choice(self, layer, x_ND):
        return self._said.get(layer, [])


def hinted_store(folder, count, said):
    store = small_store(folder, count)
    store.predict(Scripted(said), FACTS, AlwaysOn())
    store.begin(ONE_ROW)
    return store


def choose(store, layer, *experts):
    choice = Choice(None, np.array([experts], dtype=np.int32))
    return [e for ready, _ in store.stream(layer, dict.fromkeys(experts, 1), choice) for e in ready]


def settle(store):
    deadline = time.monotonic() + 10
    while store.counts().reading:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_right_hint_is_in_memory_when_its_layer_chooses(model_folder):
    store = hinted_store(model_folder, 6, {0: [Hint((2, 4), 1.0)]})
    choose(store, 0, 1, 2)
    settle(store)
    choose(store, 2, 4, 5)
    traffic = store.statistics.layers[2]
    assert (traffic.hits, traffic.prefetch_useful, traffic.misses) == (1, 1, 1)
    counted = store.statistics.hint_traffic[1]
    assert (counted.hinted, counted.right, counted.needed) == (1, 1, 2)


@pytest.mark.usefixtures("reads_by_parts")
def test_a_wrong_hint_is_dropped_when_the_true_choice_arrives(model_folder, monkeypatch):
    store = hinted_store(model_folder, 6, {0: [Hint((2, 4), 1.0)]})
    reads, begun, hold = ModelFolder.expert_reads, threading.Event(), threading.Event()

    def held(folder, layer, expert, views, *more):
        calls = reads(folder, layer, expert, views, *more)
        if (layer, expert) != (2, 4):
            return calls
        return [lambda: (begun.set(), hold.wait(10)), *calls]

    monkeypatch.setattr(ModelFolder, "expert_reads", held)
    choose(store, 0, 1, 2)
    assert begun.wait(10)
    choose(store, 2, 5)
    hold.set()
    settle(store)
    choose(store, 0, 1)
    counts = store.counts()
    assert not store.has(2, 4) and counts.resident + counts.free + counts.filling == 6
    assert store.statistics.layers[2].prefetch_wasted == 1
    assert store.statistics.layers[2].prefetch_bytes == 0


@pytest.mark.parametrize("score", [1.0, 0.9])
def test_hints_never_put_out_what_the_running_layer_needs(model_folder, score):
    hints = [Hint((2, expert), score) for expert in range(6)]
    store = hinted_store(model_folder, 2, {0: hints})
    choice = Choice(None, np.array([[1, 2]], dtype=np.int32))
    seen = []
    for ready, _ in store.stream(0, {1: 1, 2: 1}, choice):
        seen += ready
        assert all(store.has(0, expert) for expert in ready)
    assert sorted(seen) == [1, 2]


def test_what_is_hinted_and_in_memory_leaves_after_the_rest(model_folder):
    store = hinted_store(model_folder, 3, {0: [Hint((2, 0), 1.0)]})
    choose(store, 2, 0)  # the oldest, so the policy's next victim
    choose(store, 0, 3)
    choose(store, 0, 4)
    choose(store, 0, 5)  # needs a slot
    assert store.has(2, 0) and not store.has(0, 3)


def test_hints_are_forgotten_when_the_next_forward_begins(model_folder):
    store = hinted_store(model_folder, 3, {0: [Hint((2, 0), 1.0)]})
    choose(store, 0, 3)
    store.begin(ONE_ROW)  # the forward before has failed
    assert not store._filler.likely and not store._ahead._pending
    assert 1 not in store.statistics.hint_traffic, "what was not decided is not counted"


def test_a_read_that_was_dropped_and_is_needed_after_all_goes_on(make_queue):
    queue, hold, begun, done = make_queue(1), threading.Event(), threading.Event(), []

    def first():
        begun.set()
        hold.wait(10)

    read = Read((0, 0), 0, False, deque([first, lambda: done.append(1)]))
    queue.submit(read)
    begun.wait(10)
    assert not queue.cancel(read)
    queue.drop(read)
    assert queue.make_urgent(read)
    hold.set()
    queue.wait_for_all([read])
    assert read.error is None and done == [1]
    queue.close()


def test_a_dropped_read_ends_before_its_next_part_and_says_so(make_queue):
    queue, hold, begun = make_queue(1), threading.Event(), threading.Event()

    def first():
        begun.set()
        hold.wait(10)

    read = Read((0, 0), 0, False, deque([first, lambda: pytest.fail("it was dropped")]))
    queue.submit(read)
    begun.wait(10)
    queue.drop(read)
    hold.set()
    queue.wait_for_all([read])
    assert isinstance(read.error, DroppedError) and not queue.make_urgent(read)
    queue.close()


def test_early_reads_leave_a_thread_for_urgent_ones(make_queue):
    queue, hold = make_queue(2), threading.Event()
    early = [Read((0, n), n, False, deque([lambda: hold.wait(10)])) for n in range(3)]
    for read in early:
        queue.submit(read)
    urgent = Read((1, 0), 3, True, deque([lambda: None]))
    queue.submit(urgent)
    queue.wait_for_all([urgent])
    assert not any(read.is_done for read in early)
    hold.set()
    queue.wait_for_all(early)
    queue.close()


def test_chances_follow_outcomes_and_start_with_the_score():
    kinds = Calibration().kinds(1, is_resident=False)
    outcomes = kinds[bucket_of(0.9)]
    assert outcomes.chance(0.9) == 0.9
    for _ in range(400):
        outcomes.add(is_right=False)
    assert outcomes.chance(0.9) < 0.05
    assert kinds[bucket_of(0.1)].chance(0.1) == 0.1 and kinds[bucket_of(1.0)].given == 0


def test_regret_counts_what_left_for_a_hint_and_was_needed_soon():
    regret = Regret()
    before = regret.chance
    regret.begin()
    regret.left((0, 1))
    regret.missed(0, [1])
    assert regret.chance > before
    for _ in range(50):
        regret.left((0, 2))
        regret.begin()
        regret.begin()  # two forwards on it no longer counts
        regret.missed(0, [2])
    assert regret.chance < before


def test_windows_add_up_over_layers_and_into_the_next_forward():
    windows = Windows(num_layers=2)
    for moment, seconds in enumerate((1e-3, 2e-3, 4e-3)):
        windows.passed(1, moment, seconds)
    assert windows.seconds_to(1, 0, 2) == pytest.approx(3e-3)
    assert windows.seconds_to(1, 2, 1) == pytest.approx(5e-3)
    assert windows.seconds_to(2, 0, 2) == 0, "forwards of another size were not seen"
    windows.progressed(reads=10.0, busy_s=0.02)
    assert windows.rate == pytest.approx(500)
    assert windows.share_in_time(1e-3, backlog=0) == pytest.approx(1.0)
    assert windows.share_in_time(1e-3, backlog=0.5) == pytest.approx(0.5)
    assert windows.share_in_time(1e-3, backlog=5) == 0


def test_a_hint_is_worth_less_than_a_victim_that_is_likelier():
    assert gain_of(chance=0.3, share_in_time=1.0, victim_chance=0.5) < SMALLEST_GAIN
    assert gain_of(chance=0.3, share_in_time=1.0, victim_chance=0.0) > SMALLEST_GAIN
    assert gain_of(chance=1.0, share_in_time=0.0, victim_chance=0.0) < SMALLEST_GAIN
