"""A store whose slots have several sizes: exact, within its budget, counted in the right bytes."""

import numpy as np
import pytest
import torch
from mixed_model import BITS_OF, KEYS, write_mixed_model

from moeyard.errors import ConfigError
from moeyard.moe.folders.convert import convert
from moeyard.moe.folders.expert_slots import empty_experts
from moeyard.moe.folders.folder import ModelFolder
from moeyard.moe.routers.topk import TopK
from moeyard.moe.routes.reader import RouteFile
from moeyard.moe.routes.recorder import recording
from moeyard.serving.experts.budget import budget_bytes
from moeyard.serving.experts.options import StoreOptions
from moeyard.serving.experts.policies.table import POLICIES
from moeyard.serving.experts.pools import Pools, PoolSize, divide_slots, pool_sizes
from moeyard.serving.experts.recorded import read_forwards
from moeyard.serving.experts.replay.follow import LogFile, follow
from moeyard.serving.experts.tiers.disk import DiskTier
from moeyard.serving.experts.tiers.host import HostTier
from moeyard.serving.experts.tiers.rates import Rates
from moeyard.serving.experts.tiers.stored_form import name_of_bytes
from moeyard.serving.loading import open_model
from moeyard.serving.planning.budget import auto_budget, demand_of_server, divide
from moeyard.serving.planning.lossy import lossy_modes
from moeyard.serving.planning.sizes import sizes_of

from small_model import visit

BYTES = {8: 3 * 64 * 64 + 2 * 3 * 64, 4: 3 * 64 * 32 + 2 * 3 * 64}
"""Of an expert: values, and a bf16 scale per row or, as 64 inputs are one group, the same."""
SMALLEST = BYTES[8] + BYTES[4]
ALL = sum(BYTES[bits] for bits in BITS_OF.values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_mixed_model(tmp_path_factory.mktemp("late"))


@pytest.fixture(scope="module")
def early_folder(tmp_path_factory):
    """Its routers choose early, so that its store reads ahead."""
    path = tmp_path_factory.mktemp("early")
    return write_mixed_model(path, TopK(k=2, lookahead="previous_block"))


def some_ids(rows):
    return torch.randint(0, 257, (2, rows), generator=torch.Generator().manual_seed(rows))


def same_logits(folder, budget, dtype="float32", options=None):
    """Compare a model behind a store with the resident one, and return the store."""
    resident, _ = open_model(folder, dtype)
    offloaded, store = open_model(folder, dtype, expert_memory=budget, options=options)
    assert store.pools.num_bytes <= budget_bytes(ModelFolder(folder), torch.float32, budget)
    for rows in (1, 30):
        for _ in range(2):  # a cold and a warm cache
            assert torch.equal(resident(some_ids(rows)), offloaded(some_ids(rows)))
    return store


@pytest.mark.parametrize(
    ("budget", "dtype"),
    [(f"{SMALLEST}B", "float32"), ("40%", "bfloat16"), ("70%", "float32"), ("100%", "float32")],
)
def test_logits_are_the_resident_ones_bit_for_bit(folder, early_folder, budget, dtype):
    for path in (folder, early_folder):
        store = same_logits(path, budget, dtype)
        counts = store.counts()
        assert counts.free + counts.filling + counts.resident == sum(store.pools.num_slots)


OFTEN = ("lfu", "working_set")
"""Run in the short suite too; LRU is the default, which all other tests have."""
EACH_POLICY = [
    pytest.param(policy, marks=() if policy in OFTEN else pytest.mark.slow) for policy in POLICIES
]


@pytest.mark.parametrize("policy", EACH_POLICY)
def test_every_policy_gives_slots_of_the_size_that_is_needed(early_folder, policy):
    store = same_logits(early_folder, "45%", options=StoreOptions(policy=policy))
    assert store.statistics.evictions > 0


def test_reading_ahead_by_a_predictor_is_exact_too(folder):
    same_logits(folder, "45%", options=StoreOptions(predictor="previous_token"))


def test_experts_of_one_width_never_put_out_those_of_the_other(folder):
    _, store = open_model(folder, expert_memory=f"{SMALLEST}B")
    narrow = [key for key in KEYS if BITS_OF[key] == 4]
    wide = next(key for key in KEYS if BITS_OF[key] == 8)
    visit(store, wide[0], wide[1])
    for layer, expert in narrow:
        visit(store, layer, expert)
    assert store.has(*wide) and store.counts().resident == 2
    assert store.statistics.evictions == len(narrow) - 1


def test_bytes_are_those_of_each_width(folder):
    model, store = open_model(folder, expert_memory="100%")
    model(torch.arange(240).reshape(2, 120))
    read = {key for key in KEYS if store.has(*key)}
    wanted = sum(BYTES[BITS_OF[key]] for key in read)
    assert store.statistics.totals()["bytes_read"] == wanted == store.rates.bytes["disk"]
    assert {BITS_OF[key] for key in read} == {8, 4}


def test_a_log_is_followed_to_the_same_counters(early_folder, tmp_path):
    options = StoreOptions(log=tmp_path / "log.events")
    model, store = open_model(early_folder, expert_memory="45%", options=options)
    with recording(model.decoder, tmp_path / "own.routes"):
        model.generate(torch.arange(9).unsqueeze(0), 20, temperature=0)
    store.close()
    log = LogFile(options.log)
    assert log.header.pools == store.pools
    forwards = read_forwards([RouteFile(tmp_path / "own.routes")])
    found, counted = follow(log, forwards), store.statistics.totals()
    assert {name: getattr(found, name) for name in counted} == counted


SIZES = (PoolSize(20, 80), PoolSize(40, 44))


@pytest.mark.parametrize("budget", range(100, 4000, 290))
def test_slots_divide_a_budget_as_the_experts_bytes_are_divided(budget):
    wide, narrow = divide_slots(SIZES, budget)
    taken = wide * 80 + narrow * 44
    if budget < 124:
        assert (wide, narrow) == (0, 0)
        return
    assert wide >= 1 and narrow >= 1 and taken <= budget
    if (wide, narrow) != (20, 40):
        assert budget - taken < 80 and abs(wide / 20 - narrow / 40) <= 2 / 20
    assert divide_slots((PoolSize(30, 44),), budget) == (min(30, budget // 44),)


def test_a_budget_below_one_of_each_width_is_refused(folder):
    with pytest.raises(ConfigError, match=f"one expert of each width takes {SMALLEST}; give"):
        open_model(folder, expert_memory=f"{SMALLEST - 1}B")


def test_plans_know_both_widths(folder):
    files = ModelFolder(folder)
    sizes = sizes_of(files, torch.float32)
    assert pool_sizes(files, torch.float32) == ((4, BYTES[8]), (8, BYTES[4]))
    assert sizes.all_experts_bytes == ALL and sizes.expert_bytes == round(ALL / 12)
    demand = demand_of_server(1, None, 1, 0)
    room = divide(sizes, demand.other_bytes + sizes.dense_bytes + ALL, demand, is_buffered=False)
    if not room.fits_all and room.experts_bytes >= SMALLEST:
        budget = int(auto_budget(sizes, room).removesuffix("B"))
        assert SMALLEST <= budget <= room.experts_bytes
    assert lossy_modes(files, StoreOptions()) == ["mixed"]


class Memory:
    """Host memory in this process."""

    has_other_nodes = False

    def __init__(self):
        self.copies = {}

    def find(self, key):
        return self.copies.get(key)

    def bring(self, key, stored):
        self.copies[key] = np.array(stored)
        return True

    def close(self):
        pass


def test_host_memory_holds_copies_of_both_sizes(folder):
    files, memory, rates = ModelFolder(folder), Memory(), Rates()
    pools = Pools((1, 1), (BYTES[8], BYTES[4]), files.formats.kind_of)
    slots = [empty_experts(files.config, 1, torch.float32, kind) for kind in files.formats.kinds]
    tier = HostTier(DiskTier(files), memory, rates, pools)
    for key in KEYS[:2]:
        for call in tier.reads(key, slots[pools.of(key)].slot_views(0)):
            call()
    tier.close()  # what waits is brought first
    assert {key: copy.nbytes - 8 for key, copy in memory.copies.items()} == {
        key: BYTES[BITS_OF[key]] for key in KEYS[:2]
    }
    from_memory = Rates()  # without a disk that could be faster
    again = HostTier(DiskTier(files), memory, from_memory, pools)
    for key in KEYS[:2]:
        memory_of = slots[pools.of(key)]
        before = memory_of.fc1.values.clone()
        memory_of.fc1.values.fill_(1)
        for call in again.reads(key, memory_of.slot_views(0)):
            call()
        assert torch.equal(memory_of.fc1.values, before)
    again.close()
    assert rates.bytes == {"disk": SMALLEST, "host": 0, "other_node": 0}
    assert from_memory.bytes == {"disk": 0, "host": SMALLEST, "other_node": 0}


def test_copies_of_other_widths_have_another_name(folder, tmp_path):
    swapped = {key: 12 - bits for key, bits in BITS_OF.items()}
    convert(folder.parent / "plain", tmp_path / "swapped", bits_of=swapped)
    names = {name_of_bytes(ModelFolder(f), torch.float32) for f in (folder, tmp_path / "swapped")}
    assert len(names) == 2
