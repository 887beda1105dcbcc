"""The expert store and offloaded experts: exact, bounded, consistent after failures."""

import os
import random
import threading
import time

import pytest
import torch

from moeyard.errors import ConfigError, ExpertReadError
from moeyard.serving.experts.budget import parse_budget
from moeyard.serving.experts.tiers import disk
from moeyard.serving.loading import open_model

from small_model import NUM_EXPERTS, slots, small_store, visit

pytestmark = pytest.mark.usefixtures("reading_path")


@pytest.fixture
def folder(model_folder):
    return model_folder


@pytest.mark.parametrize(
    ("device", "gpus", "memory", "message"),
    [
        ("gpu", 1, None, "device is 'gpu'; use cpu, cuda or cuda:N."),
        ("cuda:x", 1, None, "device is 'cuda:x'; use cpu, cuda or cuda:N."),
        ("cuda", 0, None, "device is 'cuda', but torch sees 0 of that kind; use cpu."),
        ("cuda:1", 1, None, "device is 'cuda:1', but torch sees 1 of that kind; use cpu."),
        ("cuda", 1, "25%", "experts are offloaded for the CPU only; leave one out."),
    ],
)
def test_devices_that_cannot_work_are_refused(folder, monkeypatch, device, gpus, memory, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(ConfigError) as raised:
        open_model(folder, device=device, expert_memory=memory)
    assert message in str(raised.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("count", [12, 6, 3, 1])
def test_logits_are_the_resident_ones_bit_for_bit(folder, dtype, count):
    resident, _ = open_model(folder, dtype)
    offloaded, store = open_model(folder, dtype, expert_memory=slots(count, dtype))
    assert store.num_slots == count
    for rows in (1, 3, 70):
        ids = torch.randint(0, 257, (2, rows), generator=torch.Generator().manual_seed(rows))
        for _ in range(2):  # a cold and a warm cache
            assert torch.equal(resident(ids), offloaded(ids))
    prompt = torch.randint(0, 257, (1, 9), generator=torch.Generator().manual_seed(7))
    expected = resident.generate(prompt, 40, temperature=0)
    assert torch.equal(offloaded.generate(prompt, 40, temperature=0), expected)


def test_counts_hits_misses_and_bytes(folder):
    model, store = open_model(folder, expert_memory="100%")
    ids = torch.arange(60).unsqueeze(0)
    model(ids)
    first = {layer: (t.hits, t.misses) for layer, t in store.statistics.layers.items()}
    assert first == {0: (0, 6), 2: (0, 6)}
    model(ids)
    for traffic in store.statistics.layers.values():
        assert (traffic.hits, traffic.misses) == (6, 6)
        assert traffic.bytes_read == 6 * store.slot_bytes
    assert store.statistics.evictions == 0 and store.counts().resident == NUM_EXPERTS


def test_evicts_the_least_recently_used(folder):
    store = small_store(folder, 3)
    for expert in (0, 1, 2, 0):
        visit(store, 0, expert)
    visit(store, 2, 4)  # puts out (0, 1)
    before = store.statistics.layers[0].misses
    visit(store, 0, 0)
    visit(store, 0, 2)
    assert store.statistics.layers[0].misses == before
    visit(store, 0, 1)
    assert store.statistics.layers[0].misses == before + 1


def test_never_holds_more_than_its_slots_and_every_wave_is_disjoint(folder):
    store = small_store(folder, 2)
    for _ in range(3):
        seen = []
        for ready, weights in store.stream(2, dict.fromkeys(range(6), 1)):
            assert 1 <= len(ready) <= 2 and store.counts().resident <= 2
            assert len({weights.slot(e) for e in ready}) == len(ready)
            seen += ready
        assert sorted(seen) == list(range(6))


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_what_leaves_does_not_depend_on_which_read_ends_first(folder, monkeypatch, count):
    real, left = os.preadv, []
    for seed in (None, 1, 2):
        chance = random.Random(seed)

        def slow(*arguments, seed=seed, chance=chance):
            if seed is not None:
                time.sleep(chance.choice((0, 0, 0.001)))
            return real(*arguments)

        monkeypatch.setattr(os, "preadv", slow)
        model, store = open_model(folder, expert_memory=slots(count))
        gone, put_out = [], store.statistics.put_out
        store.statistics.put_out = lambda key, gone=gone, put_out=put_out: (
            gone.append(key),
            put_out(key),
        )
        model(torch.arange(30).unsqueeze(0))
        model.generate(torch.arange(6).unsqueeze(0), 20, temperature=0)
        store.close()
        left.append(gone)
    assert left[0] == left[1] == left[2] and len(left[0]) > 20


def test_a_passing_read_error_is_retried(folder, monkeypatch):
    monkeypatch.setattr(disk, "RETRY_PAUSE_S", 0)
    real, failures = os.preadv, [2]

    def flaky(*arguments):
        if failures[0]:
            failures[0] -= 1
            raise OSError(5, "Input/output error")
        return real(*arguments)

    resident, _ = open_model(folder)
    offloaded, _ = open_model(folder, expert_memory="50%")
    monkeypatch.setattr(os, "preadv", flaky)
    ids = torch.arange(10).unsqueeze(0)
    assert torch.equal(offloaded(ids), resident(ids)) and failures == [0]


@pytest.mark.parametrize("fault", ["error", "short"])
def test_a_lasting_read_error_is_reported_and_leaves_the_store_usable(folder, monkeypatch, fault):
    monkeypatch.setattr(disk, "RETRY_PAUSE_S", 0)
    resident, _ = open_model(folder)
    offloaded, store = open_model(folder, expert_memory=slots(4))
    ids = torch.arange(30).unsqueeze(0)
    expected = resident(ids)
    real, calls = os.preadv, [0]

    def broken(*arguments):
        calls[0] += 1
        if calls[0] < 7:
            return real(*arguments)
        if fault == "short":
            return 0
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", broken)
        with pytest.raises(ExpertReadError, match="could not be read"):
            offloaded(ids)
    counts = store.counts()
    assert counts.resident + counts.free == store.num_slots
    assert torch.equal(offloaded(ids), expected)


def test_a_wave_given_up_half_way_leaves_the_store_usable(folder):
    store = small_store(folder, 2)
    waves = store.stream(0, dict.fromkeys(range(6), 1))
    next(waves)
    waves.close()
    counts = store.counts()
    assert counts.resident + counts.free == store.num_slots
    assert sorted(
        e for ready, _ in store.stream(0, dict.fromkeys(range(6), 1)) for e in ready
    ) == list(range(6))


def test_computes_with_what_is_there_while_threads_read_the_rest(folder, monkeypatch):
    store = small_store(folder, 6, num_threads=2)
    for _ in store.stream(0, {0: 1, 1: 1}):
        pass
    real, gate, in_flight, most = os.preadv, threading.Event(), [0], [0]
    lock = threading.Lock()

    def slow(*arguments):
        with lock:
            in_flight[0] += 1
            most[0] = max(most[0], in_flight[0])
        assert gate.wait(10), "nothing computed while reading"
        with lock:
            in_flight[0] -= 1
        return real(*arguments)

    monkeypatch.setattr(os, "preadv", slow)
    waves = store.stream(0, dict.fromkeys(range(6), 1))
    ready, _ = next(waves)
    assert ready == [0, 1]
    while most[0] < 2:
        time.sleep(0.001)
    gate.set()
    assert sorted(e for wave, _ in waves for e in wave) == [2, 3, 4, 5]
    assert most[0] == 2, "more concurrent reads than threads"


def test_budgets():
    assert parse_budget("25%", 1000) == 250
    assert parse_budget("2GiB", 0) == 2 << 30 and parse_budget("1.5 MB", 0) == 1_500_000
    for bad in ("", "x", "5", "0%", "101%", "-1GiB", "3 parsecs"):
        with pytest.raises(ConfigError, match="expert-memory is"):
            parse_budget(bad, 1000)


def test_a_budget_below_one_expert_is_refused(folder):
    with pytest.raises(ConfigError, match="is 100 bytes, but one expert takes 5760"):
        open_model(folder, expert_memory="100B")
