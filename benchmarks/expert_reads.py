"""How much of the device's rate do experts get on their way into slots, hash included?

    python benchmarks/expert_reads.py [--folder FOLDER] [--limits 200 400 800 0]

Two random models in bf16, one with experts of 9.4 MB and one with experts of 393 KB, each in the
layout of ``moeyard convert`` (an expert is one extent) and with all matrices of a kind together, so
that an expert is three. The device's rate is that of preadv of the same extents without anything
else, in the best of 1, 2, 4 and 8 threads, through the page cache or around it. The store reads
every expert in the same order, at random in a layer, into slots for half of a layer, computes its
hash and compares it. Pages of the files are dropped from the cache before each pass. Passes of the
device and the stores take turns and last a second or more; rates are medians of three. Limits are
those of the control group blkio (version 1, root); without it only the unlimited device is
measured.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from moeyard.kernels.values.expert_weights import empty_slots
from moeyard.moe.config.model import ModelConfig
from moeyard.moe.config.moe import MoEConfig
from moeyard.moe.folders.extents import Chunk
from moeyard.moe.folders.families.table import FAMILIES
from moeyard.moe.folders.file_reader import Buffer, buffer_of
from moeyard.moe.folders.folder import ModelFolder
from moeyard.moe.folders.hf_config import to_hf
from moeyard.moe.folders.write_weights import plan_weights
from moeyard.moe.folders.writer import write_model_folder
from moeyard.moe.routers.topk import TopK
from moeyard.serving.experts.opening import open_store
from moeyard.serving.experts.options import StoreOptions

RESULTS = Path(__file__).parent / "results"
GROUP = Path("/sys/fs/cgroup/blkio/expert-reads")
LIMITS_MB = (200, 400, 800, 0)
SIZES = {"9.4 MB": (1024, 1536, 2, 16), "393 KB": (256, 256, 4, 128)}
"""By size of an expert: widths of model and expert, layers, experts of a layer."""
PASSES = 3
PASS_S = 1.0
"""A pass reads all again until it took this long: limits let bursts pass."""


def config_of(d_model: int, d_expert: int, num_layers: int, num_experts: int) -> ModelConfig:
    """Return a model that is little more than its experts."""
    return ModelConfig(
        vocab_size=257,
        d_model=d_model,
        num_layers=num_layers,
        num_heads=2,
        num_kv_heads=1,
        head_dim=32,
        max_positions=64,
        moe=MoEConfig(num_experts=num_experts, d_expert=d_expert, router=TopK(k=2)),
    )


class RandomWeights:
    """Weights that no compression makes small."""

    def __init__(self, config: ModelConfig) -> None:
        moe = config.moe
        assert moe is not None
        self._shapes = {"down": (config.d_model, moe.d_expert)}
        self._wide = (moe.d_expert, config.d_model)
        self._config = config

    def dense(self, parameter: str) -> torch.Tensor:
        from moeyard.moe.folders.tensor_names import dense_tensors

        return torch.randn(dict(dense_tensors(self._config))[parameter].shape)

    def expert_part(self, layer: int, expert: int, part: str) -> torch.Tensor:
        return torch.randn(self._shapes.get(part, self._wide))


def write(folder: Path, config: ModelConfig, is_one_extent: bool) -> None:
    """Write a folder, or one whose matrices of a kind are together."""
    values = to_hf(config, "bfloat16", {"eos_token_id": 256})
    family = FAMILIES[values["model_type"]]
    plans = plan_weights(config, family, RandomWeights(config), torch.bfloat16, torch.float32)
    if not is_one_extent:
        kinds = ("gate_proj", "up_proj", "down_proj")
        plans = sorted(
            (replace(plan, layer=None, expert=None) for plan in plans),
            key=lambda plan: next((i for i, kind in enumerate(kinds) if kind in plan.name), -1),
        )
    write_model_folder(folder, values, plans, lambda _: None, {})


def drop(folder: ModelFolder) -> None:
    for path in folder.files.paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def in_order(folder: ModelFolder) -> list[tuple[int, int]]:
    """Return all experts in the order of reading: by layer, and at random in a layer."""
    moe, draw = folder.config.moe, random.Random(0)
    assert moe is not None
    rows = (draw.sample(range(moe.num_experts), moe.num_experts) for _ in folder.config.moe_layers)
    return [
        (layer, expert)
        for layer, row in zip(folder.config.moe_layers, rows, strict=True)
        for expert in row
    ]


def long_rate(one: Callable[[], tuple[int, float]]) -> float:
    """Return the bytes per second of reading all until it took long enough."""
    total, seconds = 0, 0.0
    while seconds < PASS_S:
        num_bytes, more = one()
        total, seconds = total + num_bytes, seconds + more
    return total / seconds


def read_plainly(folder: ModelFolder, threads: int, direct: bool) -> tuple[int, float]:
    """Return the bytes and seconds of nothing but preadv."""
    chunks = [chunk for key in in_order(folder) for chunk in folder.expert_chunks(*key)]
    left, lock = iter(chunks), threading.Lock()
    drop(folder)

    def work(memory: Buffer) -> None:
        while True:
            with lock:
                chunk: Chunk | None = next(left, None)
            if chunk is None:
                return
            part = memory.part(0, chunk.end - chunk.start)
            chunk.file.reader.read([part], chunk.start, direct)

    # Like slots: with huge pages direct reads were half as fast again.
    largest = max(chunk.end - chunk.start for chunk in chunks)
    memories = empty_slots(threads, 1, largest, torch.uint8).zero_()
    workers = [threading.Thread(target=work, args=(buffer_of(memory),)) for memory in memories]
    started = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    seconds = time.perf_counter() - started
    return sum(chunk.end - chunk.start for chunk in chunks), seconds


class StorePass:
    """A store whose every pass reads all experts."""

    def __init__(self, path: Path, reader: str) -> None:
        self._folder = ModelFolder(path)
        self._experts = in_order(self._folder)
        layers, moe = self._folder.config.moe_layers, self._folder.config.moe
        assert moe is not None
        self._expert_bytes = 3 * self._folder.config.d_model * moe.d_expert * 2
        drop(self._folder)
        self._store = open_store(
            self._folder,
            torch.bfloat16,
            len(self._experts) // len(layers) // 2 * self._expert_bytes,
            options=StoreOptions(reader=reader),
        )
        assert self._store.read_plan is not None
        self.plan = self._store.read_plan
        self.run()  # touches the slots for the first time, and learns hashes

    def run(self) -> tuple[int, float]:
        """Return the bytes and seconds of a pass."""
        drop(self._folder)
        before = self._num_misses()
        started = time.perf_counter()
        for layer in self._folder.config.moe_layers:
            needed = [expert for of, expert in self._experts if of == layer]
            for _ready, _weights in self._store.stream(layer, dict.fromkeys(needed, 1)):
                pass
        seconds = time.perf_counter() - started
        assert self._num_misses() - before == len(self._experts), "something was in memory"
        return len(self._experts) * self._expert_bytes, seconds

    def close(self) -> None:
        self._store.close()
        self._folder.close()

    def _num_misses(self) -> int:
        return sum(traffic.misses for traffic in self._store.statistics.layers.values())


def measure(folders: Path, limit_mb: int) -> list[dict[str, Any]]:
    """Return a row per model."""
    if limit_mb:
        device = folders.stat().st_dev
        number = f"{os.major(device)}:{os.minor(device)}"
        (GROUP / "blkio.throttle.read_bps_device").write_text(f"{number} {limit_mb * 10**6}")
        (GROUP / "cgroup.procs").write_text(str(os.getpid()))
    return [row(folders, size, limit_mb) for size in SIZES]


def row(folders: Path, size: str, limit_mb: int) -> dict[str, Any]:
    one, three = (folders / f"{size.split()[0]}-{n}" for n in ("one", "three"))
    files = ModelFolder(one)
    files.files.open_direct()
    ways = [(threads, direct) for threads in (1, 2, 4, 8) for direct in (False, True)]
    first = {way: long_rate(partial(read_plainly, files, *way)) for way in ways}
    best = max(first, key=lambda way: first[way])
    layouts = {"": one, "three_": three}
    passes = {
        f"{layout}{reader}": StorePass(path, reader)
        for layout, path in layouts.items()
        for reader in ("auto", "buffered", "direct")
    }
    device: list[float] = []
    rates: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(PASSES):  # in turn, so that whatever else the machine does hits all of them
        for name, one_pass in passes.items():
            if name in ("auto", "three_auto"):
                device.append(long_rate(partial(read_plainly, files, *best)))
            rates[name].append(long_rate(one_pass.run))
    plan = passes["auto"].plan
    for one_pass in passes.values():
        one_pass.close()
    files.close()
    return {
        "expert": size,
        "limit": limit_mb * 10**6 or None,
        "device": median(device),
        "device_way": f"{best[0]} threads, {'direct' if best[1] else 'buffered'}",
        "decision": plan.text,
        "probe": plan.bytes_per_s,
        **{name: median(found) for name, found in rates.items()},
    }


def print_row(row: dict[str, Any]) -> None:
    def part(name: str) -> str:
        return f"{row[name] / 1e6:5.0f} ({row[name] / row['device']:.2f})"

    limit = "none" if row["limit"] is None else f"{row['limit'] / 1e6:.0f}"
    names = ("auto", "buffered", "direct", "three_auto", "three_buffered", "three_direct")
    print(
        f"{row['expert']:>7} {limit:>5} {row['device'] / 1e6:6.0f} {row['probe'] / 1e6:6.0f}  "
        + "  ".join(part(name) for name in names)
    )
    print(f"{'':13} device: {row['device_way']}. {row['decision']}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="a folder on the disk that is to be measured")
    parser.add_argument(
        "--limits", type=int, nargs="+", default=LIMITS_MB, help="MB/s; 0 = without a limit"
    )
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        json.dump(measure(arguments.folder, arguments.child), sys.stdout)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as space:
        for size, sizes in SIZES.items():
            for name in ("one", "three"):
                folder = Path(space) / f"{size.split()[0]}-{name}"
                write(folder, config_of(*sizes), name == "one")
        rows = run_all(Path(space), arguments.limits)
    (RESULTS / "expert_reads.json").write_text(json.dumps(rows, indent=1) + "\n")


def run_all(space: Path, wanted: Sequence[int]) -> list[dict[str, Any]]:
    print("MB/s (share of the device's rate)          one extent" + " " * 26 + "three tensors")
    print(
        " expert limit device  probe  auto          buffered      direct        auto          "
        "buffered      direct"
    )
    limits = wanted if can_limit() else (0,)
    rows = []
    for limit in limits:
        command = [sys.executable, __file__, "--folder", str(space), "--child", str(limit)]
        cache = {**os.environ, "XDG_CACHE_HOME": str(space / "cache")}
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=cache)
        for found in json.loads(done.stdout):
            print_row(found)
            rows.append(found)
    if can_limit():
        GROUP.rmdir()
    return rows


def can_limit() -> bool:
    try:
        GROUP.mkdir(exist_ok=True)
    except OSError:
        return False
    return (GROUP / "blkio.throttle.read_bps_device").exists()


if __name__ == "__main__":
    main()
