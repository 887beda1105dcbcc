"""What a server pays for following a run, and how old its weights are.

    python benchmarks/live_updates.py MODEL_DIR [--seconds 15]

A server decodes 8 requests while versions appear every 1 or 4 s, with a tenth of the experts in
each, or all units. They were written before, and publishing is a rename, so all that is measured is
the server's. Tokens per second are of this process's CPU time on one thread, because other programs
may share the machine. Staleness is in seconds of the clock since a version was published, sampled
after every step; the stall is the time between two steps in which weights are exchanged.
"""

import argparse
import queue
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from moeyard.moe.folders.folder import ModelFolder
from moeyard.moe.folders.tensor_names import dense_tensors
from moeyard.moe.folders.write_weights import FolderWeights, plan_weights
from moeyard.moe.models.sampling import SamplingParams
from moeyard.moe.routes.identity import identity_of
from moeyard.moe.updates.folder import UpdatesFolder
from moeyard.moe.updates.manifest import FILE, render
from moeyard.moe.updates.write import Head, units_of, write_update
from moeyard.serving.engine.engine import Engine
from moeyard.serving.engine.sequence import GenerationRequest
from moeyard.serving.experts.options import StoreOptions
from moeyard.serving.experts.tiers.live import LiveTier
from moeyard.serving.live.follow import Follower
from moeyard.serving.live.metrics import LiveMetrics
from moeyard.serving.live.weights import LiveWeights
from moeyard.serving.loading import open_model

from report import write_results

GREEDY = SamplingParams(temperature=0)
NUM_REQUESTS, PROMPT, NEW_TOKENS = 8, 32, 64
CASES = (None, (4.0, 0.1), (1.0, 0.1), (4.0, 1.0), (1.0, 1.0))
"""Seconds between versions, and the share of units in them; 1 = full snapshots."""


class Moved:
    """The weights of a folder with noise on some experts."""

    def __init__(self, weights: FolderWeights, keys: set[tuple[int, int]], seed: int) -> None:
        self._weights, self._keys = weights, keys
        self._generator = torch.Generator().manual_seed(seed)

    def dense(self, parameter: str) -> Tensor:
        """Return a tensor outside the experts, as it is."""
        return self._weights.dense(parameter)

    def expert_part(self, layer: int, expert: int, part: str) -> Tensor:
        """Return a part of an expert."""
        found = self._weights.expert_part(layer, expert, part)
        if (layer, expert) not in self._keys:
            return found
        noise = torch.randn(found.shape, generator=self._generator).to(found.dtype)
        return found + 0.01 * found.std() * noise


class Stash:
    """Versions that were written before, and are published one after the other."""

    def __init__(self, space: Path, folder: ModelFolder, share: float, count: int) -> None:
        self._stash, self.updates = UpdatesFolder(space / "stash"), UpdatesFolder(space / "to")
        self.updates.path.mkdir()
        self.num_bytes, self._next = 0, 1
        for version in range(1, count + 1):
            self._write(folder, version, share)

    def _write(self, folder: ModelFolder, version: int, share: float) -> None:
        config, family = folder.config, folder.family
        experts = [(layer, e) for layer in config.moe_layers for e in range(config.moe.num_experts)]
        order = torch.randperm(len(experts), generator=torch.Generator().manual_seed(version))
        keys = {experts[index] for index in order[: int(share * len(experts))].tolist()}
        source = Moved(FolderWeights(folder, torch.bfloat16), keys, version)
        plans = plan_weights(config, family, source, torch.bfloat16, torch.float32)
        units = units_of(plans, {family.tensor_name(n): n for n, _ in dense_tensors(config)})
        is_full = share == 1 or version == 1
        if not is_full:
            units = [unit for unit in units if unit.key in keys]
        head = Head(
            version=version,
            base=None if is_full else version - 1,
            run="benchmark",
            architecture=identity_of(config).architecture,
            what="all",
            step=version,
            published=0.0,
        )
        self.num_bytes = write_update(self._stash.of(version), head, units).num_bytes

    def publish(self) -> None:
        """Publish the next version as of now."""
        version, self._next = self._next, self._next + 1
        path, manifest = self._stash.of(version), self._stash.manifest(version)
        (path / FILE).write_text(render(replace(manifest, published=time.time())))
        path.rename(self.updates.of(version))


class Served:
    """An engine that this thread drives, and a follower in another one."""

    def __init__(self, model: str, memory: str | None, updates: UpdatesFolder) -> None:
        tier = LiveTier()
        options = StoreOptions(live=tier)
        opened, self.store = open_model(model, expert_memory=memory, options=options)
        self.engine = Engine(opened, lambda ids: "x" * len(ids), self.store)
        weights = LiveWeights(ModelFolder(Path(model)), opened.decoder, self.store, tier)
        self.metrics = LiveMetrics(self.engine.metrics.registry)
        self.follower = Follower(updates, weights, self._exchange, self.metrics, 0.05)
        self._waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.stalls_s: list[float] = []
        self.tokens = self._number = 0

    def _exchange(self, version: int, swap: Callable[[], None]) -> "Future[None]":
        done: Future[None] = Future()
        self._waiting.put((version, swap, done))
        return done

    def exchange(self) -> None:
        """Do what waits for the end of a step."""
        while not self._waiting.empty():
            version, swap, done = self._waiting.get()
            started = time.perf_counter()
            self.engine.exchange_weights(version, swap)
            self.stalls_s.append(time.perf_counter() - started)
            done.set_result(None)

    def step(self) -> None:
        """Do a step; there are always requests."""
        generator = torch.Generator().manual_seed(self._number)
        while not self.engine.has_work or self._number % NUM_REQUESTS:
            ids = torch.randint(0, 255, (PROMPT,), generator=generator).tolist()
            self._number += 1
            request = GenerationRequest(
                str(self._number), tuple(ids), NEW_TOKENS, GREEDY, ignore_eos=True
            )
            self.engine.add(request)
        self.tokens += len(self.engine.step())

    def close(self) -> None:
        """End the follower and the store."""
        self.follower._is_closed.set()
        while self.follower._thread.is_alive():
            self.exchange()
            time.sleep(0.01)
        if self.store is not None:
            self.store.close()


def measure(
    model: str, memory: str | None, case: tuple[float, float] | None, seconds: float
) -> dict[str, Any]:
    """Serve for some seconds while versions appear."""
    interval_s, share = case or (seconds, 0.0)
    count = 0 if case is None else int(seconds / interval_s) + 1
    with tempfile.TemporaryDirectory() as space:
        folder = ModelFolder(Path(model))
        stash = Stash(Path(space), folder, share, count)
        folder.close()
        served = Served(model, memory, stash.updates)
        served.follower.start()
        for _ in range(20):
            served.step()  # warm
        served.tokens, ages_s, published = 0, [], 0
        began, cpu_s = time.monotonic(), time.process_time()
        while (passed_s := time.monotonic() - began) < seconds:
            if published < count and passed_s >= published * interval_s:
                stash.publish()
                published += 1
            served.exchange()
            served.step()
            if served.metrics.current is not None:
                ages_s.append(time.time() - served.metrics.current.published)
        cpu_s = time.process_time() - cpu_s
        served.close()
    return {
        "memory": memory or "all",
        "interval_s": None if case is None else interval_s,
        "share": share,
        "update_bytes": stash.num_bytes,
        "tokens_per_cpu_s": served.tokens / cpu_s,
        "staleness_s": mean(ages_s) if ages_s else None,
        "most_staleness_s": max(ages_s, default=None),
        "stall_ms": 1e3 * mean(served.stalls_s) if served.stalls_s else None,
        "exchanges": len(served.stalls_s),
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--seconds", type=float, default=15.0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for memory in (None, "25%"):
        for case in CASES:
            row = measure(given.model, memory, case, given.seconds)
            rows.append(row)
            print(_line(row, next(r for r in rows if r["memory"] == row["memory"])), flush=True)
    write_results("live_updates", {"rows": rows})


def _line(row: dict[str, Any], without: dict[str, Any]) -> str:
    speed = row["tokens_per_cpu_s"]
    text = f"experts in memory: {row['memory']:4} {speed:7.1f} tokens/s"
    if row["interval_s"] is None:
        return f"{text}  without updates"
    return (
        f"{text} ({speed / without['tokens_per_cpu_s']:.2f}x)  every {row['interval_s']:.0f} s "
        f"{row['update_bytes'] / 1e6:5.1f} MB  staleness {row['staleness_s']:.2f} s "
        f"(most {row['most_staleness_s']:.2f})  stall {row['stall_ms']:.1f} ms, "
        f"{row['exchanges']} exchanges"
    )


if __name__ == "__main__":
    main()
