"""A publisher without a run: random changes of the small model as versions, and what to compare."""

import random
import time
from concurrent.futures import Future
from pathlib import Path

import torch

from moeyard.moe.folders.families.table import FAMILIES
from moeyard.moe.folders.folder import ModelFolder
from moeyard.moe.folders.hf_config import to_hf
from moeyard.moe.folders.tensor_names import dense_tensors
from moeyard.moe.folders.write_weights import plan_weights
from moeyard.moe.models.decoder import Decoder
from moeyard.moe.routes.identity import identity_of
from moeyard.moe.updates.folder import UpdatesFolder
from moeyard.moe.updates.manifest import Key
from moeyard.moe.updates.write import Head, units_of, write_update
from moeyard.serving.engine.engine import Engine
from moeyard.serving.experts.offloaded import OffloadedExperts
from moeyard.serving.experts.options import StoreOptions
from moeyard.serving.experts.tiers.live import LiveTier
from moeyard.serving.live.follow import Follower
from moeyard.serving.live.metrics import LiveMetrics
from moeyard.serving.live.weights import LiveWeights
from moeyard.serving.loading import open_model

from small_model import DecoderWeights
from test_engine import latin, request

PARTS = ("gate", "up", "down")


class RandomRun:
    """A decoder that changes at random, as a run would publish it."""

    def __init__(self, decoder: Decoder, path: Path, seed: int = 0) -> None:
        self.decoder, self.updates = decoder, UpdatesFolder(path)
        self.draw = random.Random(seed)
        self.version = 0
        path.mkdir(exist_ok=True)

    def units(self) -> dict[Key, list[torch.Tensor]]:
        """Return the memory of every unit."""
        weights, config = DecoderWeights(self.decoder), self.decoder.config
        found: dict[Key, list[torch.Tensor]] = {}
        for layer in config.moe_layers:
            for expert in range(config.moe.num_experts):
                parts = [weights.expert_part(layer, expert, part) for part in PARTS]
                found[layer, expert] = parts
        return found | {name: [weights.dense(name)] for name, _ in dense_tensors(config)}

    def change(self, keys: list[Key] | None = None) -> list[Key]:
        """Change units, by default a random choice of them; returns which."""
        units = self.units()
        if keys is None:
            keys = self.draw.sample(list(units), self.draw.randint(1, len(units) // 2))
        generator = torch.Generator().manual_seed(self.draw.randrange(1 << 30))
        for key in keys:
            for tensor in units[key]:
                noise = torch.randn(tensor.shape, generator=generator)
                tensor.add_(0.3 * tensor.std() * noise)
        return keys

    def publish(self, keys: list[Key] | None, run: str = "r", what: str = "all") -> int:
        """Publish units as the next version, all as a full snapshot for None."""
        config = self.decoder.config
        family = FAMILIES[to_hf(config, "float32")["model_type"]]
        weights = DecoderWeights(self.decoder)
        plans = plan_weights(config, family, weights, torch.float32, torch.float32)
        units = units_of(plans, {family.tensor_name(n): n for n, _ in dense_tensors(config)})
        if keys is not None:
            units = [unit for unit in units if unit.key in keys]
        architecture, base = identity_of(config).architecture, self.version or None
        head = Head(
            version=self.version + 1,
            base=None if keys is None else base,
            run=run,
            architecture=architecture,
            what=what,
            step=10 * (self.version + 1),
            published=time.time(),
        )
        write_update(self.updates.of(head.version), head, units)
        self.version += 1
        return self.version

    def next(self, full_every: int = 4) -> int:
        """Change something and publish it."""
        keys = self.change()
        is_full = self.version % full_every == 0
        return self.publish(None if is_full else keys)


class Receiver:
    """A server without HTTP, whose follower looks when it is told to."""

    def __init__(self, folder, updates, memory=None, dtype=None):
        tier = LiveTier()
        options = StoreOptions(live=tier)
        self.model, self.store = open_model(folder, dtype, expert_memory=memory, options=options)
        self.engine = Engine(self.model, latin, self.store, max_num_seqs=4)
        self.follower = self._follower(folder, updates, tier)

    def _follower(self, folder, updates, tier):
        def exchange(version, swap):
            self.engine.exchange_weights(version, swap)
            done = Future()
            done.set_result(None)
            return done

        weights = LiveWeights(ModelFolder(folder), self.model.decoder, self.store, tier)
        metrics = LiveMetrics(self.engine.metrics.registry)
        return Follower(updates, weights, exchange, metrics)

    @property
    def version(self):
        current = self.follower.metrics.current
        return 0 if current is None else current.version

    def weights(self):
        return weights_of(self.model.decoder)

    def say(self, prompt, count=12):
        self.engine.add(request("a", prompt, max_tokens=count))
        events = []
        while self.engine.has_work:
            events += self.engine.step()
        return "".join(event.text for event in events)


def weights_of(decoder: Decoder) -> dict[Key, list[torch.Tensor]]:
    """Return copies of all that a served model computes with, experts behind a store as read."""
    tensors = {**dict(decoder.named_parameters()), **dict(decoder.named_buffers())}
    found: dict[Key, list[torch.Tensor]] = {
        name: [tensors[name].detach().clone()] for name, _ in dense_tensors(decoder.config)
    }
    for layer, moe_layer in decoder.moe_layers():
        experts = moe_layer.experts
        if isinstance(experts, OffloadedExperts):
            wanted = dict.fromkeys(range(experts.num_experts), 1)
            for ready, memory in experts.store.stream(layer, wanted):
                for expert in ready:
                    views = memory.slot_views(memory.slot(expert))
                    found[layer, expert] = [views[part].clone() for part in PARTS]
            continue
        for expert, views in enumerate(experts.slot_views()):
            found[layer, expert] = [views[part].clone() for part in PARTS]
    return found


def are_equal(a: dict[Key, list[torch.Tensor]], b: dict[Key, list[torch.Tensor]]) -> bool:
    """Say whether two models have the same weights, bit for bit."""
    assert a.keys() == b.keys()
    return all(torch.equal(x, y) for key in a for x, y in zip(a[key], b[key], strict=True))


def copied(units: dict[Key, list[torch.Tensor]]) -> dict[Key, list[torch.Tensor]]:
    """Return copies of units' tensors."""
    return {key: [tensor.clone() for tensor in tensors] for key, tensors in units.items()}


def decoder_of(folder: Path) -> Decoder:
    """Return a decoder with the weights of a model folder, all in memory and free to change."""
    model, _ = open_model(folder)
    return model.decoder
