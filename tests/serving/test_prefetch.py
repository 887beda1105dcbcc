"""Reading ahead: exact whatever the timing, never in the way, and counted."""

import os
import random
import threading
import time
from collections import deque

import pytest
import torch

from moeyard.errors import ExpertReadError
from moeyard.moe.folders.folder import ModelFolder
from moeyard.moe.routers.hash import Hash
from moeyard.moe.routers.topk import TopK
from moeyard.serving.experts.read_queue import ReadQueue
from moeyard.serving.experts.reads import Read
from moeyard.serving.experts.tiers import disk
from moeyard.serving.loading import open_model

from small_model import (
    NUM_EXPERTS,
    slots,
    small_store,
    visit,
    with_router,
    write_random_model,
)

pytestmark = pytest.mark.usefixtures("reading_path")

ROUTERS = {
    "token": Hash(k=2, table="random"),
    "previous_block": TopK(k=2, lookahead="previous_block"),
    "attention_input": TopK(k=2, lookahead="attention_input", score="sigmoid"),
}


@pytest.fixture(scope="module", params=ROUTERS)
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("early") / request.param
    write_random_model(path, with_router(ROUTERS[request.param]))
    return path


def settle(store) -> None:
    """Wait for what is being read ahead."""
    wait_for_reads(store, 0)


def wait_for_reads(store, number) -> None:
    """Wait until so many reads are under way."""
    deadline = time.monotonic() + 10
    while store.counts().reading != number:
        assert time.monotonic() < deadline, f"{store.counts().reading} reads are under way"
        time.sleep(0.001)


def slots_known(store) -> int:
    """Return how many slots the store accounts for, in whatever state."""
    counts = store.counts()
    return counts.resident + counts.free + counts.filling


@pytest.mark.parametrize("count", [12, 6, 3, 2, 1])
def test_logits_are_the_resident_ones_bit_for_bit_however_slow_the_disk(folder, count, monkeypatch):
    resident, _ = open_model(folder)
    offloaded, store = open_model(folder, expert_memory=slots(count))
    real, chance = os.preadv, random.Random(count)

    def slow(*arguments):
        time.sleep(chance.choice((0, 0, 0.0005)))
        return real(*arguments)

    monkeypatch.setattr(os, "preadv", slow)
    prompt = torch.randint(0, 257, (1, 9), generator=torch.Generator().manual_seed(7))
    expected = resident.generate(prompt, 24, temperature=0)
    assert torch.equal(offloaded.generate(prompt, 24, temperature=0), expected)
    ids = torch.randint(0, 257, (2, 40), generator=torch.Generator().manual_seed(8))
    assert torch.equal(offloaded(ids), resident(ids))
    assert slots_known(store) == count

    traffic = store.statistics.layers.values()
    assert sum(layer.prefetch_issued for layer in traffic) > 0 or count == 1
    for layer in traffic:
        outcomes = layer.prefetch_useful + layer.prefetch_late + layer.prefetch_wasted
        assert layer.prefetch_issued == outcomes, "every prefetch has one outcome"
        assert layer.prefetch_useful <= layer.hits
        assert layer.prefetch_bytes <= layer.bytes_read
    if count == NUM_EXPERTS:
        assert sum(layer.prefetch_wasted for layer in traffic) == 0
        assert sum(layer.bytes_read for layer in traffic) <= NUM_EXPERTS * store.slot_bytes


def test_every_need_is_a_hit_a_miss_or_late(folder):
    model, store = open_model(folder, expert_memory=slots(5))
    needed, stream = [], store.stream

    def counted(layer, experts, *choice):
        needed.extend(experts)
        return stream(layer, experts, *choice)

    store.stream = counted
    model.generate(torch.arange(6).unsqueeze(0), 20, temperature=0)
    layers = store.statistics.layers.values()
    assert len(needed) == sum(t.hits + t.misses + t.prefetch_late for t in layers) > 0


def test_reads_begin_when_the_choice_is_known_and_compute_need_not_wait(folder):
    store = small_store(folder, 6)
    store.prefetch(2, [1, 4])
    settle(store)
    assert visit(store, 2, 1, 4) == [1, 4]
    traffic = store.statistics.layers[2]
    assert (traffic.hits, traffic.misses, traffic.prefetch_useful) == (2, 0, 2)
    assert traffic.stall_s == 0 and store.statistics.num_waits() == 0


def test_reading_ahead_never_puts_out_what_is_known_to_be_needed(folder):
    store = small_store(folder, 3)
    visit(store, 0, 0, 1)
    store.prefetch(0, [0, 1])
    store.prefetch(2, [3, 4, 5])
    assert visit(store, 0, 0, 1) == [0, 1] and store.statistics.layers[0].misses == 2
    assert sorted(visit(store, 2, 3, 4, 5)) == [3, 4, 5]
    assert store.statistics.layers[0].prefetch_issued == 0


def test_compute_takes_the_slots_of_prefetches_rather_than_stand_still(folder):
    store = small_store(folder, 2)
    store.prefetch(2, [0, 1])
    settle(store)
    assert sorted(visit(store, 0, 2, 3, 4)) == [2, 3, 4]
    traffic = store.statistics.layers[2]
    assert traffic.prefetch_wasted == 1
    assert store.has(2, 0), "what is needed first must stay"
    settle(store)
    assert sorted(visit(store, 2, 0, 1)) == [0, 1], "and what was put out is read again ahead"
    assert (traffic.misses, traffic.prefetch_issued) == (0, 3)


def test_compute_waits_for_its_own_experts_before_it_puts_prefetches_out(folder):
    store = small_store(folder, 3)
    visit(store, 0, 0)
    store.prefetch(2, [3, 4])
    settle(store)
    assert visit(store, 0, 0, 1) == [0, 1]
    assert store.statistics.layers[2].prefetch_wasted == 0


@pytest.mark.usefixtures("reads_by_parts")
def test_prefetches_that_finish_while_experts_stream_are_booked_at_once(folder, monkeypatch):
    store = small_store(folder, 3)
    hold, reads = threading.Event(), ModelFolder.expert_reads

    def held(folder, layer, expert, views, *more):
        calls = reads(folder, layer, expert, views, *more)
        return [lambda: hold.wait(10), *calls] if layer == 2 else calls

    monkeypatch.setattr(ModelFolder, "expert_reads", held)
    store.prefetch(2, [3, 4])
    waves = store.stream(0, dict.fromkeys(range(6), 1))
    next(waves)
    assert store.statistics.layers[2].bytes_read == 0
    hold.set()
    settle(store)
    next(waves)
    assert store.statistics.layers[2].bytes_read == 2 * store.slot_bytes
    assert slots_known(store) == 3
    waves.close()


def test_a_forward_that_fails_leaves_nothing_expected(folder, monkeypatch):
    monkeypatch.setattr(disk, "RETRY_PAUSE_S", 0)
    store = small_store(folder, 2)

    def broken(*_):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", broken)
        store.prefetch(2, [0, 1, 2, 3])
        with pytest.raises(ExpertReadError):
            visit(store, 0, 1)
    assert store.counts().expected == store.counts().announced == 0


def test_an_announcement_that_did_not_come_true_protects_nothing(folder):
    store = small_store(folder, 2)
    visit(store, 0, 0, 1)
    store.prefetch(0, [0, 1])
    visit(store, 0, 5)
    assert store.counts().expected == 0


def test_closing_the_store_leaves_nobody_waiting(folder, monkeypatch):
    store, begun, hold = small_store(folder, 6, num_threads=1), threading.Event(), threading.Event()
    real = os.preadv

    def slow(*arguments):
        begun.set()
        hold.wait(10)
        return real(*arguments)

    monkeypatch.setattr(os, "preadv", slow)
    failures = []

    def compute():
        try:
            visit(store, 0, 0, 1, 2)
        except ExpertReadError as error:
            failures.append(str(error))

    thread = threading.Thread(target=compute, daemon=True)  # or a failure would hang the run
    thread.start()
    begun.wait(10)
    wait_for_reads(store, 3)
    closing = threading.Thread(target=store.close, daemon=True)
    closing.start()
    try:
        wait_for_reads(store, 1)  # those that had not begun have failed
    finally:
        hold.set()
    thread.join(10)
    closing.join(10)
    assert not thread.is_alive() and not closing.is_alive()
    assert "the expert store is closed" in failures[0]


def test_a_failed_prefetch_is_read_again_when_it_is_needed(folder, monkeypatch):
    monkeypatch.setattr(disk, "RETRY_PAUSE_S", 0)
    real, failures = os.preadv, [0]

    def broken(*arguments):
        if failures[0]:
            failures[0] -= 1
            raise OSError(5, "Input/output error")
        return real(*arguments)

    store = small_store(folder, 4)
    failures[0] = 3 if isinstance(store._reads, ReadQueue) else 4  # C++ tries once, then Python
    monkeypatch.setattr(os, "preadv", broken)
    store.prefetch(0, [2])
    settle(store)
    assert visit(store, 0, 2) == [2]
    traffic = store.statistics.layers[0]
    assert (traffic.prefetch_wasted, traffic.misses, failures) == (1, 1, [0])


def test_urgent_reads_go_before_and_between_the_parts_of_early_ones(make_queue):
    queue, done = make_queue(num_threads=1), []
    hold, begun = threading.Event(), threading.Event()

    def parts(name, count):
        def part(index):
            if (name, index) == ("early", 0):
                begun.set()
                hold.wait(10)
            done.append((name, index))

        return [lambda index=index: part(index) for index in range(count)]

    def read(name, is_urgent):
        made = Read((0, 0), 0, is_urgent, deque(parts(name, 3)))
        queue.submit(made)
        return made

    reads = [read("early", False)]
    begun.wait(10)
    reads += [read("later", False), read("now", True)]
    promoted = read("promoted", False)
    queue.make_urgent(promoted)
    hold.set()
    queue.wait_for_all([*reads, promoted])
    order = [name for name, _ in done]
    assert order == ["early"] + ["now"] * 3 + ["promoted"] * 3 + ["early"] * 2 + ["later"] * 3
    queue.close()


def test_a_read_that_became_urgent_while_it_ran_is_not_laid_aside(make_queue):
    queue, done, hold, begun = make_queue(1), [], threading.Event(), threading.Event()

    def first_part():
        begun.set()
        hold.wait(10)
        done.append("early")

    early = Read((0, 0), 0, False, deque([first_part, lambda: done.append("early")]))
    queue.submit(early)
    begun.wait(10)
    queue.submit(now := Read((0, 1), 1, True, deque([lambda: done.append("now")])))
    queue.make_urgent(early)
    hold.set()
    queue.wait_for_all([early, now])
    assert done == ["early", "early", "now"]
    queue.close()


def test_a_read_that_becomes_urgent_while_it_is_laid_aside_goes_on_first(monkeypatch):
    queue, done, hold, begun = ReadQueue(1), [], threading.Event(), threading.Event()
    real = queue._do

    def laid_aside(read):
        is_done = real(read)
        if not is_done:
            queue.make_urgent(read)  # compute asks for it before the thread has put it back
        return is_done

    def first_part():
        begun.set()
        hold.wait(10)
        done.append("early")

    monkeypatch.setattr(queue, "_do", laid_aside)
    early = Read((0, 0), 0, False, deque([first_part, lambda: done.append("early")]))
    queue.submit(early)
    begun.wait(10)
    queue.submit(now := Read((0, 1), 1, True, deque([lambda: done.append("now")])))
    hold.set()
    queue.wait_for_all([early, now])
    assert done == ["early", "early", "now"]
    queue.close()


def test_a_read_that_ends_because_it_was_dropped_cannot_be_made_urgent(monkeypatch):
    """Compute must read the expert again, and not wait for a read that brings nothing."""
    queue, hold, begun, answers = ReadQueue(1), threading.Event(), threading.Event(), []
    real = queue._do

    def asked_too_late(read):
        is_done = real(read)
        answers.append(queue.make_urgent(read))  # before the thread has said that it ended
        return is_done

    monkeypatch.setattr(queue, "_do", asked_too_late)
    parts = deque([lambda: (begun.set(), hold.wait(10)), lambda: None])
    queue.submit(early := Read((0, 0), 0, False, parts))
    begun.wait(10)
    queue.drop(early)
    hold.set()
    queue.wait_for_all([early])
    assert answers == [False] and early.error is not None
    queue.close()


def test_a_read_taken_back_does_not_happen_and_one_under_way_cannot_be(make_queue):
    queue, hold, begun = make_queue(num_threads=1), threading.Event(), threading.Event()

    def wait():
        begun.set()
        hold.wait(10)

    first = Read((0, 0), 0, False, deque([wait]))
    second = Read((0, 1), 1, False, deque([lambda: pytest.fail("it was taken back")]))
    queue.submit(first)
    queue.submit(second)
    begun.wait(10)
    assert queue.cancel(second) and not queue.cancel(first)
    hold.set()
    queue.wait_for_all([first])
    queue.close()
    assert second.error is None and not second.is_done
