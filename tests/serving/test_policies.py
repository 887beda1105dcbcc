"""What a policy puts out, replayed on lists of keys, and what the store makes of it."""

import random
from collections import Counter

import pytest
import torch

import moeyard
from moeyard.errors import ConfigError
from moeyard.moe.routes.rows import Phase
from moeyard.serving.experts.forwards import Forward
from moeyard.serving.experts.options import StoreOptions
from moeyard.serving.experts.policies.lru import LeastRecentlyUsed
from moeyard.serving.experts.policies.policy import CacheFacts
from moeyard.serving.experts.policies.table import POLICIES, open_policy
from moeyard.serving.loading import open_model

from small_model import slots, small_store, visit

FACTS = CacheFacts(moe_layers=(0, 2), num_experts=6, num_slots=3, architecture="")
ROUTE = [(0, 0), (0, 1), (0, 0), (2, 4), (0, 1), (0, 0), (2, 5), (2, 4), (0, 0), (2, 5)]


class LeastFrequentlyUsed:
    """The smallest policy of one's own: puts out the expert that was needed least often."""

    def __init__(self):
        self._uses, self._here = Counter(), {}

    def begin(self, forward):
        pass

    def add(self, key):
        self._here[key] = None

    def touch(self, key, rows):
        self._uses[key] += 1

    def expect(self, key):
        pass

    def forget(self, key):
        del self._here[key]

    def victim(self, protected):
        free = [key for key in self._here if key not in protected]
        return min(free, key=self._uses.__getitem__, default=None)


class Stubborn(LeastFrequentlyUsed):
    """Gives away what is needed."""

    def victim(self, protected):
        return next(iter(self._here), None)


def replay(policy, keys, num_slots) -> list[tuple[int, int]]:
    """Need ``keys`` one after the other, without a model or a disk; return those not there."""
    here, missed = set(), []
    for key in keys:
        policy.touch(key, 1)
        if key in here:
            continue
        missed.append(key)
        if len(here) == num_slots:
            victim = policy.victim({key})
            here.remove(victim)
            policy.forget(victim)
        here.add(key)
        policy.add(key)
    return missed


def test_replaying_keys_shows_what_each_policy_reads_again():
    recent, frequent = LeastRecentlyUsed(), LeastFrequentlyUsed()
    first = [(0, 0), (0, 1), (2, 4)]
    assert replay(recent, ROUTE, 2) == [*first, (0, 1), (0, 0), (2, 5), (2, 4), (0, 0), (2, 5)]
    assert replay(frequent, ROUTE, 2) == [*first, (0, 1), (2, 5), (2, 4), (2, 5)]


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("num_slots", [1, 2, 3])
def test_the_store_reads_what_the_replay_says(model_folder, name, num_slots):
    store = small_store(model_folder, num_slots, options=StoreOptions(name))
    came = []
    for layer, expert in ROUTE:
        before = store.statistics.layers[layer].misses
        visit(store, layer, expert)
        if store.statistics.layers[layer].misses > before:
            came.append((layer, expert))
    assert came == replay(open_policy(name, FACTS), ROUTE, num_slots)
    store.close()


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_gives_away_nothing_that_is_protected(name):
    policy = open_policy(name, FACTS)
    keys = [(0, 0), (0, 1), (2, 0)]
    assert policy.victim(()) is None
    for key in keys:
        policy.add(key)
    assert policy.victim(set(keys)) is None
    assert policy.victim({keys[0], keys[2]}) == keys[1]
    policy.forget(keys[1])
    assert policy.victim({keys[0]}) == keys[2]


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_keeps_its_promises_whatever_happens(name):
    chance = random.Random(name)
    policy, here = open_policy(name, FACTS), set()
    keys = [(layer, expert) for layer in (0, 2) for expert in range(6)]
    victims = 0
    for _ in range(3000):
        event = chance.choice(("begin", "touch", "touch", "expect", "add", "forget", "victim"))
        key = chance.choice(keys)
        if event == "begin":
            sequences = tuple(sorted(chance.sample(range(9), chance.randint(1, 3))))
            phases = tuple(chance.choice((Phase.PREFILL, Phase.DECODE)) for _ in sequences)
            lengths = tuple(chance.randint(1, 9) for _ in sequences)
            policy.begin(Forward(sequences, phases, lengths))
        elif event == "touch":
            policy.touch(key, chance.randint(1, 5))
        elif event == "expect":
            policy.expect(key)
        elif event == "add" and key not in here:
            here.add(key)
            policy.add(key)
        elif event == "forget" and key in here:
            here.remove(key)
            policy.forget(key)
        elif event == "victim":
            protected = set(chance.sample(keys, chance.randint(0, 12)))
            found = policy.victim(protected)
            assert (found is None) == (not here - protected)
            if found is not None:
                assert found in here - protected
                victims += 1
                if chance.random() < 0.5:
                    here.remove(found)
                    policy.forget(found)
    assert victims > 100


def test_being_chosen_keeps_an_expert_from_going_first():
    policy = LeastRecentlyUsed()
    for key in ((0, 0), (0, 1)):
        policy.add(key)
    policy.expect((0, 0))
    policy.expect((5, 5))  # not in a slot: nothing to remember
    assert policy.victim(()) == (0, 1)
    assert policy.victim({(0, 1)}) == (0, 0)


def test_a_policy_of_ones_own_decides_and_changes_no_number(model_folder):
    resident = moeyard.load(model_folder)
    policy = LeastFrequentlyUsed()
    model = moeyard.load(model_folder, expert_memory=slots(3), expert_policy=policy)
    prompt = torch.arange(9).unsqueeze(0)
    expected = resident.generate(prompt, 20, temperature=0)
    assert torch.equal(model.generate(prompt, 20, temperature=0), expected)
    assert torch.equal(model(prompt), resident(prompt))
    assert policy._uses.total() > 50 and len(policy._here) == 3, "it was asked"


def test_a_policy_that_gives_away_what_is_needed_is_found_out(model_folder):
    model, store = open_model(
        model_folder, expert_memory=slots(3), options=StoreOptions(Stubborn())
    )
    with pytest.raises(ConfigError, match=r"expert_policy Stubborn chose \(0, \d\), which is"):
        model(torch.arange(40).unsqueeze(0))
    assert store.counts().resident + store.counts().free == 3
    store.close()


def test_a_policy_that_keeps_every_slot_is_found_out_and_nothing_waits(model_folder):
    class Hoarder(LeastFrequentlyUsed):
        def victim(self, protected):
            return None

    model, store = open_model(model_folder, expert_memory=slots(3), options=StoreOptions(Hoarder()))
    with pytest.raises(ConfigError, match="expert_policy Hoarder chose no expert to evict"):
        for start in (0, 40):
            model(torch.arange(start, start + 40).unsqueeze(0))
    store.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"expert_policy": "mru", "expert_memory": "50%"},
            "expert_policy is 'mru'; use one of lru",
        ),
        ({"expert_policy": LeastFrequentlyUsed()}, "is a LeastFrequentlyUsed, but all experts are"),
    ],
)
def test_policies_that_cannot_be_used_are_refused(model_folder, options, message):
    with pytest.raises(ConfigError, match=message):
        moeyard.load(model_folder, **options)
