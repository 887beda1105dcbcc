"""Experts from a node's memory: exact bytes, one disk read, and the disk when memory fails."""

import os
import threading

import numpy as np
import pytest
import torch

from moeyard.moe.folders.convert import convert
from moeyard.moe.folders.expert_slots import empty_experts, expert_bytes
from moeyard.moe.folders.folder import ModelFolder
from moeyard.serving.experts.pools import Pools
from moeyard.serving.experts.tiers.disk import DiskTier
from moeyard.serving.experts.tiers.host import NUM_BUFFERS, HostTier
from moeyard.serving.experts.tiers.rates import Rates
from moeyard.serving.experts.tiers.stored_form import copy_out, name_of_bytes, num_bytes_of

from small_model import CONFIG, write_random_model


class Memory:
    """Copies in a dictionary."""

    def __init__(self, elsewhere=None):
        self.copies, self.elsewhere = {}, elsewhere or {}
        self.dropped, self.is_closed = [], False

    @property
    def has_other_nodes(self):
        return bool(self.elsewhere)

    def find(self, key):
        return self.copies.get(key)

    def find_elsewhere(self, key):
        return self.elsewhere.get(key)

    def bring(self, key, stored):
        stored = stored.copy()
        stored.flags.writeable = False
        self.copies[key] = stored
        return True

    def drop(self, key):
        self.dropped.append(key)

    def close(self):
        self.is_closed = True


class CountedDisk:
    def __init__(self, folder):
        self._disk, self.keys, self.problem = DiskTier(folder), [], None

    def straight(self, key, views):
        return None

    def reads(self, key, views):
        def run(call):
            self.keys.append(key)
            if self.problem:
                raise self.problem
            call()

        return [lambda call=call: run(call) for call in self._disk.reads(key, views)]


@pytest.fixture(scope="module", params=["fp32", "bf16", "int8", "int4"])
def case(request, tmp_path_factory):
    """A folder and the type of its slots."""
    path = tmp_path_factory.mktemp("models") / "wide"
    moe = CONFIG.moe.model_copy(update={"d_expert": 64})
    write_random_model(path, CONFIG.model_copy(update={"d_model": 64, "moe": moe}))
    if request.param not in ("fp32", "bf16"):
        convert(path, path.parent / request.param, request.param)
        path = path.parent / request.param
    return ModelFolder(path), torch.bfloat16 if request.param == "bf16" else torch.float32


class Bench:
    """A tier with the memory behind it, the disk behind that, and slots to fill."""

    def __init__(self, case, memory=None):
        self.folder, self.dtype = case
        self.memory, self.disk, self.rates = memory or Memory(), CountedDisk(self.folder), Rates()
        self.slots = empty_experts(self.folder.config, 2, self.dtype, self.folder.packed)
        num_bytes = expert_bytes(self.folder.config, self.dtype, self.folder.packed)
        self.tier = HostTier(self.disk, self.memory, self.rates, Pools((2,), (num_bytes,)))

    def fill(self, key, slot=0):
        """Fill a slot and return its bytes."""
        views = self.slots.slot_views(slot)
        wipe(views)
        for call in self.tier.reads(key, views):
            call()
        return as_bytes(views)

    def expected(self, key):
        views = self.slots.slot_views(1)
        wipe(views)
        self.folder.read_expert(*key, views)
        return as_bytes(views)


def wipe(views):
    for view in views.values():
        for part in view if isinstance(view, tuple) else (view,):
            part.view(torch.uint8).fill_(0x5A)


def as_bytes(views):
    stored = np.empty(num_bytes_of(views), np.uint8)
    copy_out(views, stored)
    return stored.tobytes()


def test_a_second_replica_gets_the_same_bytes_and_reads_no_disk(case):
    first = Bench(case)
    key = (2, 3)
    expected = first.expected(key)
    assert first.fill(key) == expected
    first.tier.close()
    assert first.memory.is_closed and list(first.memory.copies) == [key]
    second = Bench(case, first.memory)
    assert second.fill(key) == expected and second.disk.keys == []
    assert second.rates.reads == {"host": 1, "other_node": 0, "disk": 0}
    other = second.expected((0, 1))
    assert second.fill((0, 1)) == other and set(second.disk.keys) == {(0, 1)}
    second.tier.close()
    assert second.rates.reads["disk"] == 1 and set(second.memory.copies) == {key, (0, 1)}


def test_a_copy_of_another_node_becomes_one_of_this_node(case):
    source = Bench(case)
    expected = source.fill((2, 5))
    source.tier.close()
    bench = Bench(case, Memory(elsewhere=source.memory.copies))
    assert bench.fill((2, 5)) == expected and bench.disk.keys == []
    assert bench.rates.reads == {"host": 0, "other_node": 1, "disk": 0}
    bench.tier.close()
    assert bench.memory.copies[(2, 5)].tobytes()[: len(expected)] == expected


@pytest.mark.parametrize("damage", ["short", "long", "flipped"])
def test_a_damaged_copy_is_dropped_and_the_disk_read(case, damage):
    source = Bench(case)
    expected = source.fill((0, 2))
    source.tier.close()
    stored = source.memory.copies[(0, 2)].copy()
    if damage == "flipped":
        stored[len(stored) // 2] ^= 16
    else:
        stored = stored[:-1] if damage == "short" else np.append(stored, stored[:1])
    bench = Bench(case, Memory())
    bench.memory.copies[(0, 2)] = stored
    assert bench.fill((0, 2)) == expected and bench.rates.reads["disk"] == 1
    assert bench.memory.dropped == [(0, 2)]
    bench.tier.close()


def test_a_disk_that_fails_leaves_no_copy(case):
    bench = Bench(case)
    bench.disk.problem = OSError("the disk is gone")
    with pytest.raises(OSError, match="gone"):
        bench.fill((0, 0))
    bench.tier.close()
    assert bench.memory.copies == {} and bench.rates.reads["disk"] == 0


def test_compute_never_waits_for_a_slow_memory(case):
    is_open = threading.Event()

    class Slow(Memory):
        def bring(self, key, stored):
            is_open.wait(60)
            return super().bring(key, stored)

    bench = Bench(case, Slow())
    keys = [(0, expert) for expert in range(NUM_BUFFERS + 3)]
    for key in keys:
        bench.fill(key)
    assert bench.memory.copies == {}
    is_open.set()
    bench.tier.close()
    assert list(bench.memory.copies) == keys[:NUM_BUFFERS], "the others found no free buffer"


def test_stored_bytes_have_a_name_that_changes_with_the_files_and_the_type(tmp_path):
    write_random_model(tmp_path / "m")
    folder = ModelFolder(tmp_path / "m")
    name = name_of_bytes(folder, torch.float32)
    assert name == name_of_bytes(ModelFolder(tmp_path / "m"), torch.float32)
    assert name != name_of_bytes(folder, torch.bfloat16)
    hashes = tmp_path / "m" / "expert_hashes.json"
    os.utime(tmp_path / "m" / "model.safetensors", (1, 1))
    assert name == name_of_bytes(folder, torch.float32), "the hashes of all experts are the same"
    hashes.write_text(hashes.read_text().replace("a", "b"))
    assert name != name_of_bytes(folder, torch.float32)
    hashes.unlink()
    name = name_of_bytes(folder, torch.float32)
    os.utime(tmp_path / "m" / "model.safetensors", (2, 2))
    assert name != name_of_bytes(folder, torch.float32)
