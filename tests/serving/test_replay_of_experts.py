"""A replay of recorded routes counts what the store counted, and Belady's rule is the bound."""

import itertools
import random

import numpy as np
import pytest
import torch

from moeyard.moe.config.model import ModelConfig
from moeyard.moe.models.sampling import SamplingParams
from moeyard.moe.routes.reader import RouteFile
from moeyard.moe.routes.recorder import recording
from moeyard.moe.routes.rows import Phase
from moeyard.serving.engine.engine import Engine
from moeyard.serving.engine.sequence import GenerationRequest
from moeyard.serving.experts.forwards import Forward
from moeyard.serving.experts.options import StoreOptions
from moeyard.serving.experts.policies.belady import Belady
from moeyard.serving.experts.policies.policy import CacheFacts
from moeyard.serving.experts.policies.table import LEARNING, POLICIES, open_policy
from moeyard.serving.experts.recorded import RecordedForward, read_forwards
from moeyard.serving.experts.replay.run import all_keys, counters_of, replay
from moeyard.serving.loading import open_model

from small_model import NUM_EXPERTS, slots

ALL = (*POLICIES, *LEARNING)
IDS = torch.arange(40).reshape(2, 20)


def facts_of(config: ModelConfig, num_slots: int, architecture: str) -> CacheFacts:
    return CacheFacts(config.moe_layers, config.moe.num_experts, num_slots, architecture)


def generate_some(model, path) -> RouteFile:
    """Record texts of one request, a forward of two texts, and answers of a batch."""
    with recording(model.decoder, path):
        model.generate(torch.arange(9).unsqueeze(0), 8, temperature=0)
        model(IDS)
        model.generate(torch.arange(60, 90).unsqueeze(0), 8, temperature=0)
        engine = Engine(model, lambda ids: bytes(i % 256 for i in ids).decode("latin-1"), None)
        for name, start in (("a", 3), ("b", 90), ("c", 200)):
            prompt = tuple(range(start, start + 7))
            engine.add(GenerationRequest(name, prompt, 6, SamplingParams(temperature=0)))
        while engine.has_work:
            engine.step()
    return RouteFile(path)


def spec_of(name: str, file) -> str:
    return f"{name}:{file}" if name in LEARNING else name


@pytest.fixture(scope="module")
def resident(model_folder):
    model, _ = open_model(model_folder)
    return model


@pytest.fixture(scope="module")
def recorded(resident, tmp_path_factory) -> RouteFile:
    return generate_some(resident, tmp_path_factory.mktemp("routes") / "some.routes")


GRID = [
    pytest.param(name, count, marks=[] if name == "lru" or count == 3 else pytest.mark.slow)
    for name in ALL
    for count in (1, 3, 6, 12)
]
"""Slots for 8, 25, 50 and 100 % of the experts; with 1 and 3 slots a layer needs several waves."""


@pytest.mark.parametrize(("name", "count"), GRID)
def test_a_run_counts_what_the_replay_of_its_routes_counts(
    model_folder, tmp_path, resident, recorded, name, count
):
    spec = spec_of(name, recorded.path)
    model, store = open_model(model_folder, expert_memory=slots(count), options=StoreOptions(spec))
    own = generate_some(model, tmp_path / "own.routes")
    facts = facts_of(model.config, count, own.header.model.architecture)
    ran = counters_of(store.statistics)
    again = replay(read_forwards([own]), facts, open_policy(spec, facts), store.slot_bytes)
    for field in ("hits", "misses", "late", "issued", "evictions", "bytes_read"):
        assert getattr(again, field) == getattr(ran, field), field
    assert ran.misses >= (NUM_EXPERTS if count < NUM_EXPERTS else 1)
    # Scores, answers of batches and routes are those of the resident model, whatever leaves.
    assert torch.equal(model(IDS), resident(IDS))
    ours, theirs = own.read(), recorded.read()
    assert (ours.experts_NLK == theirs.experts_NLK).all()
    assert (ours.tokens_N == theirs.tokens_N).all()
    store.close()


def random_forwards(chance: random.Random, turns: int, layers: int, experts: int, most: int):
    found = []
    for _ in range(turns):
        experts_NLK = np.full((1, layers, most), -1)
        rows_of_L = []
        for place in range(layers):
            chosen = sorted(chance.sample(range(experts), chance.randint(1, most)))
            experts_NLK[0, place, : len(chosen)] = chosen
            rows_of_L.append(dict.fromkeys(chosen, 1))
        forward = Forward((0,), (Phase.DECODE,), (1,))
        found.append(RecordedForward(forward, tuple(rows_of_L), experts_NLK))
    return found


def fewest_misses(forwards, facts) -> int:
    """Try every way to choose which experts stay, where each layer's experts fit into the slots."""
    costs = {frozenset(): 0}
    for keys in map(frozenset, all_keys(forwards, facts)):
        after: dict[frozenset, int] = {}
        for here, misses in costs.items():
            misses += len(keys - here)
            for others in itertools.combinations(
                here - keys, min(len(here - keys), facts.num_slots - len(keys))
            ):
                stay = keys | set(others)
                after[stay] = min(misses, after.get(stay, misses))
        costs = after
    return min(costs.values())


class Scripted:
    """Puts out what a list of numbers says, and notes how many it could have chosen from."""

    def __init__(self, script):
        self._script, self._here, self.widths = list(script), {}, []

    def begin(self, forward): ...

    def touch(self, key, rows): ...

    def expect(self, key): ...

    def add(self, key):
        self._here[key] = None

    def forget(self, key):
        del self._here[key]

    def victim(self, protected):
        free = [key for key in self._here if key not in protected]
        if not free:
            return None
        turn = len(self.widths)
        self.widths.append(len(free))
        return free[self._script[turn] if turn < len(self._script) else 0]


def fewest_misses_in_waves(forwards, facts) -> int:
    """Try every victim of every moment, also where a layer needs more experts than there are slots.

    Lists of choices are tried in the order of counting.
    """
    best, script = 1 << 30, []
    while True:
        policy = Scripted(script)
        best = min(best, replay(forwards, facts, policy).misses)
        script = script + [0] * (len(policy.widths) - len(script))
        while script and script[-1] + 1 == policy.widths[len(script) - 1]:
            script.pop()
        if not script:
            return best
        script[-1] += 1


@pytest.mark.parametrize("seed", range(10))
def test_no_choice_of_victims_misses_less_often_than_belady(seed):
    chance = random.Random(seed)
    forwards = random_forwards(chance, turns=8, layers=2, experts=4, most=3)
    facts = CacheFacts((0, 1), 4, chance.choice((3, 4, 5)), "")
    bound = replay(forwards, facts, Belady(all_keys(forwards, facts))).misses
    assert bound == fewest_misses(forwards, facts)
    for name in POLICIES:
        assert replay(forwards, facts, open_policy(name, facts)).misses >= bound


@pytest.mark.parametrize("seed", range(6))
def test_belady_is_the_bound_also_when_a_layer_needs_more_experts_than_there_are_slots(seed):
    forwards = random_forwards(random.Random(seed), turns=2, layers=2, experts=3, most=3)
    facts = CacheFacts((0, 1), 3, 2, "")
    bound = replay(forwards, facts, Belady(all_keys(forwards, facts))).misses
    assert bound == fewest_misses_in_waves(forwards, facts)


@pytest.mark.parametrize("num_slots", [2, 5, 11])
def test_belady_is_the_bound_of_every_policy_on_recorded_routes(recorded, num_slots):
    header, forwards = recorded.header, read_forwards([recorded])
    facts = CacheFacts(header.moe_layers, header.num_experts, num_slots, header.model.architecture)
    bound = replay(forwards, facts, Belady(all_keys(forwards, facts)))
    needs = sum(len(rows_of) for f in forwards for rows_of in f.rows_of_L)
    for name in ALL:
        found = replay(forwards, facts, open_policy(spec_of(name, recorded.path), facts))
        assert found.misses >= bound.misses and found.hits + found.misses == needs
    assert bound.tokens == len(recorded.read())
