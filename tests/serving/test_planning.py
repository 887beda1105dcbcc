"""What a model takes, what auto leaves for experts, and the bounds on speed."""

import pytest
import torch

import moeyard
from moeyard.errors import ConfigError
from moeyard.moe.folders.folder import ModelFolder
from moeyard.moe.routes.recorder import recording
from moeyard.serving import memory
from moeyard.serving.experts.budget import count_slots, parse_budget
from moeyard.serving.experts.offloaded import OffloadedExperts
from moeyard.serving.experts.pools import Pools
from moeyard.serving.planning import decide as deciding
from moeyard.serving.planning.bounds import COPY_PASSES, Copies, Speeds, bound_of
from moeyard.serving.planning.budget import (
    KV_SHARE,
    PAGE_CACHE_BYTES,
    RESERVE,
    Demand,
    auto_budget,
    divide,
)
from moeyard.serving.planning.decide import decide
from moeyard.serving.planning.describe import Decision, describe
from moeyard.serving.planning.recorded_hits import RecordedHits
from moeyard.serving.planning.sizes import ModelSizes, sizes_of
from moeyard.serving.serve_args import ServeArgs
from moeyard.serving.server_budgets import with_budgets

from small_model import CONFIG, NUM_EXPERTS, SLOT_ELEMENTS, slots, write_random_model

SIZES = ModelSizes(
    dense_bytes=1 << 30,
    num_experts=1000,
    expert_bytes=10 << 20,
    stored_expert_bytes=20 << 20,
    experts_per_token=40,
    dense_bytes_per_token=900 << 20,
    kv_bytes_per_token=64 << 10,
    max_positions=4096,
)
SPEEDS = Speeds(memory=10e9, disk=500e6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "small"
    write_random_model(path)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_are_those_of_the_opened_model(folder, dtype):
    model = moeyard.load(folder, dtype=dtype)
    sizes = sizes_of(ModelFolder(folder), dtype)
    parts = dict(model.decoder.state_dict())
    experts = [part for name, part in parts.items() if ".experts." in name]
    dense = [part for name, part in parts.items() if ".experts." not in name]
    assert sizes.all_experts_bytes == sum(part.nbytes for part in experts)
    assert sizes.dense_bytes == sum(part.numel() for part in dense) * dtype.itemsize
    embedding = parts["embed_tokens.weight"].numel() * dtype.itemsize
    assert sizes.dense_bytes_per_token == sizes.dense_bytes - embedding
    assert sizes.experts_per_token == 2 * CONFIG.moe.router.k
    assert sizes.stored_expert_bytes == SLOT_ELEMENTS * 4
    cache = model.decoder.new_cache(64)
    cache.reserve(64)
    parts = [part for layer in range(CONFIG.num_layers) for part in cache.view(layer, 64)]
    assert sizes.kv_bytes_per_token * 64 == sum(part.nbytes for part in parts)


def test_auto_is_what_is_left_after_everything_else():
    demand = Demand(max_num_seqs=4, max_model_len=1024, other_bytes=1 << 30, host_bytes=1 << 29)
    room = divide(SIZES, 8 << 30, demand)
    kv = 4 * 1024 * SIZES.kv_bytes_per_token
    left = (8 << 30) - int((8 << 30) * RESERVE) - (1 << 30) - (1 << 29) - SIZES.dense_bytes - kv
    assert (room.kv_bytes, room.experts_bytes) == (kv, left - PAGE_CACHE_BYTES)
    slots = room.experts_bytes // SIZES.expert_bytes
    assert auto_budget(SIZES, room) == f"{slots * SIZES.expert_bytes}B"
    assert divide(SIZES, 8 << 30, demand, is_buffered=False).experts_bytes == left


def test_keys_and_values_get_a_stated_part_where_all_would_be_too_much():
    room = divide(SIZES, 8 << 30, Demand(max_num_seqs=100, other_bytes=0))
    assert room.kv_wanted_bytes == 100 * 4096 * SIZES.kv_bytes_per_token > 8 << 30
    whole = (8 << 30) - room.reserve_bytes - SIZES.dense_bytes
    assert room.kv_bytes == int(whole * KV_SHARE)


def test_replicas_divide_the_machine():
    one = divide(SIZES, 20 << 30, Demand(other_bytes=0))
    two = divide(SIZES, 20 << 30, Demand(other_bytes=0, num_replicas=2))
    assert one.fits_all and auto_budget(SIZES, one) is None
    budget = parse_budget(auto_budget(SIZES, two), 0)
    taken = 2 * (budget + SIZES.dense_bytes + two.kv_bytes + two.page_cache_bytes)
    assert 0 <= (20 << 30) - two.reserve_bytes - taken < 2 * SIZES.expert_bytes + 4


def test_no_room_for_one_expert_is_one_sentence():
    room = divide(SIZES, 1 << 30, Demand())
    with pytest.raises(ConfigError, match=r"auto, but 1 GiB of free memory leave no room") as error:
        auto_budget(SIZES, room)
    assert "\n" not in str(error.value)


def free_for(monkeypatch, num_slots):
    """Let the machine have room for so many slots of the small model, and for nothing more."""
    sizes = SLOT_ELEMENTS * 4 * num_slots
    monkeypatch.setattr(deciding, "divide", lambda s, *_, **__: _room(s, sizes))


def _room(sizes, experts_bytes):
    room = divide(sizes, 1 << 40, Demand())
    fits = experts_bytes >= sizes.all_experts_bytes
    fields = {name: getattr(room, name) for name in type(room).__slots__}
    return type(room)(**{**fields, "experts_bytes": experts_bytes, "fits_all": fits})


def test_load_takes_auto(folder, monkeypatch):
    free_for(monkeypatch, 5)
    (_, layer), *_ = moeyard.load(folder, expert_memory="auto").decoder.moe_layers()
    assert isinstance(layer.experts, OffloadedExperts) and "5 slots for the 12" in repr(layer)
    free_for(monkeypatch, NUM_EXPERTS)
    (_, layer), *_ = moeyard.load(folder, expert_memory="auto").decoder.moe_layers()
    assert not isinstance(layer.experts, OffloadedExperts)


def test_every_replica_gets_the_budget_that_was_decided_once(folder, monkeypatch):
    free_for(monkeypatch, 3)
    args, _ = with_budgets(ServeArgs(model=str(folder), expert_memory="auto", host_memory="50%"))
    assert args.expert_memory == slots(3) and args.host_memory == slots(6)
    free_for(monkeypatch, NUM_EXPERTS)
    assert with_budgets(args)[0] == args
    args, _ = with_budgets(ServeArgs(model=str(folder), expert_memory="auto", host_memory="50%"))
    assert args.expert_memory is None and args.host_memory is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"host_memory": "50%"}, "without expert-memory all experts are in each replica's memory"),
        ({"host_memory": "1B", "expert_memory": "50%"}, "host-memory is 1 bytes, but one expert"),
        ({"host_memory": "auto", "expert_memory": "50%"}, r"write a size like 2GiB or a share"),
    ],
)
def test_a_host_memory_that_makes_no_sense_is_one_sentence(folder, values, message):
    with pytest.raises(ConfigError, match=message):
        with_budgets(ServeArgs(model=str(folder), **values))


def test_a_model_without_experts_has_nothing_for_auto(tmp_path):
    write_random_model(tmp_path / "dense", CONFIG.model_copy(update={"moe": None}))
    folder = ModelFolder(tmp_path / "dense")
    with pytest.raises(ConfigError, match="has no experts"):
        decide(folder, torch.float32, "auto", Demand())
    assert decide(folder, torch.float32, None, Demand()) == (None, None)


def test_memory_is_checked_for_all_replicas_and_host_memory(folder, monkeypatch):
    files = ModelFolder(folder)
    sizes = sizes_of(files, torch.float32)
    one = sizes.all_experts_bytes + sizes.dense_bytes
    monkeypatch.setattr(memory, "available_bytes", lambda: 2 * one)
    memory.check_memory(files, torch.float32, None, num_replicas=2)
    with pytest.raises(ConfigError, match="for each of 2 replicas"):
        memory.check_memory(files, torch.float32, None, num_replicas=2, host_bytes=1)


def test_a_bound_counts_bytes_over_bandwidths():
    bound = bound_of(SIZES, Copies(num_slots=250), SPEEDS)
    memory_s = ((900 << 20) + 40 * (10 << 20)) / 10e9
    disk_s = 40 * 0.75 * (20 << 20) / 500e6
    assert bound.hit_rate == 0.25 and bound.memory_s == memory_s
    assert bound.reads_s == pytest.approx(disk_s)
    assert bound.on_demand == pytest.approx(1 / (memory_s + disk_s))
    assert bound.read_ahead == pytest.approx(1 / disk_s)
    recorded = bound_of(SIZES, Copies(num_slots=250, hit_rate=0.9), SPEEDS)
    assert recorded.reads_s == pytest.approx(disk_s * 0.1 / 0.75)
    whole = bound_of(SIZES, Copies(num_slots=1000), SPEEDS)
    assert whole.reads_s == 0 and whole.on_demand == whole.read_ahead == 1 / memory_s


def test_host_memory_makes_a_bound_better():
    host = bound_of(SIZES, Copies(num_slots=250, num_in_host=500), SPEEDS)
    of_copies = COPY_PASSES * (10 << 20) / 10e9
    misses = 40 * 0.75
    assert host.reads_s == pytest.approx(misses * (0.5 * of_copies + 0.5 * (20 << 20) / 500e6))


def test_recorded_routes_give_the_hit_rate_of_a_real_run(folder, tmp_path):
    model = moeyard.load(folder, expert_memory=slots(5))
    with recording(model.decoder, tmp_path / "r.routes", written_by="generate"):
        model.generate("hello", max_new_tokens=20, temperature=0)
    (_, layer), *_ = model.decoder.moe_layers()
    layers = layer.experts._store.statistics.layers.values()
    hits, misses = sum(t.hits for t in layers), sum(t.misses for t in layers)
    recorded = RecordedHits([tmp_path / "r.routes"], CONFIG, "decayed_lfu")
    assert recorded.hit_rate(Pools((5,), (1,))) == hits / (hits + misses)
    other = CONFIG.model_copy(update={"num_layers": 5})
    with pytest.raises(ConfigError, match="has routes of another model"):
        RecordedHits([tmp_path / "r.routes"], other, "decayed_lfu")


def test_the_paragraph_says_what_was_decided():
    room = divide(SIZES, 8 << 30, Demand(max_num_seqs=100))
    number = room.experts_bytes // SIZES.expert_bytes
    bound = bound_of(SIZES, Copies(num_slots=number), SPEEDS)
    decision = Decision(
        sizes=SIZES,
        num_slots=number,
        slots_bytes=number * SIZES.expert_bytes,
        room=room,
        host_bytes=4 << 30,
        speeds=SPEEDS,
        bound=bound,
    )
    text = describe(decision)
    assert f"Memory holds {number} of 1000 experts" in text and "4 GiB of experts" in text
    assert "The policy decayed_lfu" in text and "8 GiB of memory are free" in text
    assert "Upper bound for one request" in text and 4 <= text.count("\n") <= 6
    whole = Decision(
        sizes=SIZES,
        num_slots=1000,
        slots_bytes=SIZES.all_experts_bytes,
        speeds=SPEEDS,
        bound=bound_of(SIZES, Copies(num_slots=1000), SPEEDS),
    )
    assert "All 1000 experts are in memory: 9.77 GiB." in describe(whole)
    assert "policy" not in describe(whole)


def test_slots_of_an_auto_budget_are_whole(folder):
    files = ModelFolder(folder)
    assert count_slots(files, torch.float32, parse_budget(slots(4), 0)) == 4
