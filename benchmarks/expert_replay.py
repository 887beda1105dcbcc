"""What do policies and logs cost, and does a replay's clock say how long a real run waits?

    python benchmarks/expert_replay.py MODEL TEXT [--bandwidth 40MB/s]

MODEL is a model folder with byte tokens. Run it in a blkio group that limits reads of the disk to
the given bandwidth. Before each forward the script drops the model's file from the page cache, so
every read goes to the disk. Without ``--bandwidth`` only costs are measured.
"""

import argparse
import os
import random
import tempfile
import time
from pathlib import Path

import torch

import moeyard
from moeyard.moe.batch import batch_of
from moeyard.moe.routes.reader import RouteFile
from moeyard.moe.routes.recorder import recording
from moeyard.moe.routes.rows import Phase
from moeyard.serving.experts.budget import parse_budget
from moeyard.serving.experts.event_log import EventLog
from moeyard.serving.experts.forwards import Forward
from moeyard.serving.experts.policies.policy import CacheFacts
from moeyard.serving.experts.policies.table import LEARNING, POLICIES, open_policy
from moeyard.serving.experts.pools import Pools
from moeyard.serving.experts.recorded import RecordedForward, read_forwards
from moeyard.serving.experts.replay.run import Pace, replay
from moeyard.serving.loading import open_model

from report import write_results

LAYERS, EXPERTS, K, SLOTS = 48, 128, 8, 5000
"""Of the costs: 6144 experts, as in Qwen3-30B-A3B, and most of them in memory."""


def cost_of(name: str, forwards: list[RecordedForward]) -> tuple[float, float]:
    """Return microseconds per need and per victim, with a begin per forward in the needs."""
    facts = CacheFacts(tuple(range(LAYERS)), EXPERTS, SLOTS, "")
    learned = LEARNING.get(name)
    policy = open_policy(name, facts) if learned is None else learned(facts, forwards[:40])
    here = {(n // EXPERTS, n % EXPERTS) for n in random.Random(0).sample(range(6144), SLOTS)}
    for key in here:
        policy.add(key)
    needs = victims = 0
    need_s = victim_s = 0.0
    for recorded in forwards:
        started = time.perf_counter()
        policy.begin(recorded.forward)
        need_s += time.perf_counter() - started
        for layer, rows_of in enumerate(recorded.rows_of_L):
            keys = {(layer, expert) for expert in rows_of}
            started = time.perf_counter()
            for key in keys:
                policy.touch(key, 1)
            need_s += time.perf_counter() - started
            needs += len(keys)
            for key in keys - here:
                started = time.perf_counter()
                victim = policy.victim(keys)
                policy.forget(victim)
                policy.add(key)
                victim_s += time.perf_counter() - started
                victims += 1
                here.remove(victim)
                here.add(key)
    return 1e6 * need_s / needs, 1e6 * victim_s / max(1, victims)


def random_forwards(number: int) -> list[RecordedForward]:
    """Return forwards of one row; a quarter of the choices are those of the forward before."""
    chance, found, last = random.Random(1), [], [[0] * K for _ in range(LAYERS)]
    for _ in range(number):
        for layer in range(LAYERS):
            kept = chance.sample(last[layer], K // 4)
            last[layer] = list({*kept, *chance.sample(range(EXPERTS), K)})[:K]
            last[layer] += [0] * (K - len(last[layer]))
        rows_of_L = tuple(dict.fromkeys(sorted(chosen), 1) for chosen in last)
        experts_NLK = torch.tensor(last).numpy()[None]
        found.append(RecordedForward(Forward((0,), (Phase.DECODE,), (1,)), rows_of_L, experts_NLK))
    return found


def log_cost(events: int = 200_000) -> float:
    """Return microseconds per event, with writing."""
    with tempfile.TemporaryDirectory() as folder:
        log = EventLog(Path(folder) / "a", CacheFacts((0,), 4, 2, ""), Pools((2,), (1,)), "lru")
        started = time.perf_counter()
        for number in range(events):
            log.add("evict", 17, number % 128)
        log.close({})
        return 1e6 * (time.perf_counter() - started) / events


@torch.inference_mode()
def read_text(model: moeyard.LanguageModel, ids: torch.Tensor, before_each=None) -> float:
    """Read a text byte by byte; return the seconds of the forwards."""
    cache, seconds = model.decoder.new_cache(len(ids)), 0.0
    for at in range(len(ids)):
        if before_each is not None:
            before_each()
        cache.reserve(1)
        started = time.perf_counter()
        model.decoder(batch_of([ids[at : at + 1]], [cache]))
        seconds += time.perf_counter() - started
    return seconds


def forget_file(path: Path) -> None:
    """Drop a file from the page cache, and read nothing of it beyond what is asked for."""
    for link in Path("/proc/self/fd").iterdir():
        if link.exists() and link.resolve() == path.resolve():
            os.posix_fadvise(int(link.name), 0, 0, os.POSIX_FADV_DONTNEED)
            os.posix_fadvise(int(link.name), 0, 0, os.POSIX_FADV_RANDOM)


def throttled(folder: Path, text: Path, bandwidth: int, share: str) -> dict:
    """Compare a real run on a slow disk with the replay of its routes."""
    ids = torch.tensor(list(text.read_bytes()[:256]))
    resident = moeyard.load(folder)
    read_text(resident, ids)
    compute_s = read_text(resident, ids) / len(ids)
    model, store = open_model(folder, expert_memory=share)
    with tempfile.TemporaryDirectory() as work:
        path = Path(work) / "a.routes"
        with recording(model.decoder, path):
            seconds = read_text(model, ids, lambda: forget_file(folder / "model.safetensors"))
        stall_s = sum(layer.stall_s for layer in store.statistics.layers.values())
        store.close()
        header, forwards = RouteFile(path).header, read_forwards([RouteFile(path)])
    facts = CacheFacts(
        header.moe_layers, header.num_experts, store.num_slots, header.model.architecture
    )
    pace = Pace.of(bandwidth, store.slot_bytes, compute_s / len(header.moe_layers))
    found = replay(forwards, facts, open_policy("lru", facts), store.slot_bytes, pace)
    return {
        "share": share,
        "layer_ms": 1e3 * pace.layer_s,
        "read_ms": 1e3 * pace.read_s,
        "misses": found.misses,
        "real_misses": store.statistics.totals()["misses"],
        "stall_s": found.stall_s,
        "real_stall_s": stall_s,
        "total_s": found.total_s,
        "real_total_s": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--bandwidth", help="of the disk, such as 40MB/s")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict = {"costs": {}, "log_us": log_cost()}
    forwards = random_forwards(150)
    print(f"{SLOTS} slots, {LAYERS} layers of {EXPERTS} experts, {K} for a token")
    print(f"{'policy':13} {'us per need':>12} {'us per victim':>14}")
    for name in (*POLICIES, *LEARNING):
        need, victim = cost_of(name, forwards)
        figures["costs"][name] = {"need_us": need, "victim_us": victim}
        print(f"{name:13} {need:12.2f} {victim:14.1f}", flush=True)
    print(f"log: {figures['log_us']:.2f} us per event")
    if arguments.bandwidth is not None:
        bandwidth = parse_budget(arguments.bandwidth.removesuffix("/s"), 0, "--bandwidth")
        figures["throttled"] = []
        for share in ("25%", "50%"):
            found = throttled(arguments.model, arguments.text, bandwidth, share)
            figures["throttled"].append(found)
            print(
                f"{share}: misses {found['misses']} (real {found['real_misses']}), stall "
                f"{found['stall_s']:.2f} s (real {found['real_stall_s']:.2f} s, "
                f"{found['stall_s'] / found['real_stall_s']:.3f}), total {found['total_s']:.2f} s "
                f"(real {found['real_total_s']:.2f} s)"
            )
    print(f"written to {write_results('expert_replay', figures).name}")


if __name__ == "__main__":
    main()
