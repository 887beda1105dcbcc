"""Host memory for experts: what sharing saves, what an expert takes, and what kills leave.

Two processes, as replicas are, read all experts of a folder through the host tier. The disk is
limited to 400 MB/s by a control group, where there is cgroup v1 and the right to use it, and its
page cache is emptied before each read from the disk.
"""

import argparse
import os
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from moeyard.moe.config.model import ModelConfig
from moeyard.moe.config.moe import MoEConfig
from moeyard.moe.folders.expert_slots import empty_experts, expert_bytes
from moeyard.moe.folders.folder import ModelFolder
from moeyard.moe.routers.topk import TopK
from moeyard.serving.cluster.own_ray import prepare, start
from moeyard.serving.experts.pools import Pools
from moeyard.serving.experts.tiers.disk import DiskTier
from moeyard.serving.experts.tiers.shared_memory import object_store_bytes

from report import write_results

CONFIG = ModelConfig(
    vocab_size=257,
    d_model=1024,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    max_positions=256,
    moe=MoEConfig(num_experts=8, d_expert=2048, router=TopK(k=2)),
)
KEYS = [(0, expert) for expert in range(8)]
GROUP = Path("/sys/fs/cgroup/blkio/moeyard-host-tier")
TURNS = 4


class Replica:
    """Fills one slot again and again, from memory or from the disk."""

    def __init__(self, folder: str, model: str, budget_bytes: int, group: str | None) -> None:
        from moeyard.serving.experts.tiers.host import HostTier
        from moeyard.serving.experts.tiers.node_link import NodeLink
        from moeyard.serving.experts.tiers.rates import Rates

        if group is not None:
            (Path(group) / "cgroup.procs").write_text(str(os.getpid()))
        torch.set_num_threads(1)
        self._folder = ModelFolder(Path(folder))
        slot_bytes = expert_bytes(self._folder.config, torch.float32, None)
        self._slot = empty_experts(self._folder.config, 2, torch.float32, None)
        self._disk = DiskTier(self._folder)
        self.rates = Rates()
        self.link = NodeLink(model, budget_bytes)
        self._host = HostTier(self._disk, self.link, self.rates, Pools((2,), (slot_bytes,)))

    def read(self, tier: str, keys: list[tuple[int, int]]) -> list[float]:
        """Fill a slot with each expert; return the seconds of each."""
        chosen = self._host if tier == "host" else self._disk
        seconds = []
        for key in keys:
            self._empty_page_cache()
            started = time.perf_counter()
            for call in chosen.reads(key, self._slot.slot_views(0)):
                call()
            seconds.append(time.perf_counter() - started)
        return seconds

    def read_for_ever(self) -> None:
        while True:
            self.read("host", KEYS)

    def is_exact(self, key: tuple[int, int]) -> bool:
        """Say whether host tier and disk fill a slot with the same bytes."""
        self.read("host", [key])
        views, wanted = self._slot.slot_views(0), self._slot.slot_views(1)
        self._folder.read_expert(*key, wanted)
        return all(torch.equal(views[part], wanted[part]) for part in views)

    def reads(self) -> dict[str, int]:
        return dict(self.rates.reads)

    def pid(self) -> int:
        return os.getpid()

    def _empty_page_cache(self) -> None:
        for path in self._folder.path.glob("*.safetensors"):
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    """Measure and print the figures; with --write also as results/host_tier.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", type=int, default=400_000_000, help="bytes/s of the disk")
    parser.add_argument("--kills", type=int, default=5, help="replicas to kill while they read")
    parser.add_argument("--write", action="store_true", help="write results/host_tier.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        _write_model(folder)
        group = _limit(folder, arguments.rate)
        try:
            figures = _measure(folder, group, arguments.kills)
        finally:
            if group is not None:
                time.sleep(1)  # the replicas have just ended
                GROUP.rmdir()
    figures["disk_limit_bytes_per_s"] = arguments.rate if group is not None else None
    lines = _lines(figures)
    print("\n".join(lines))
    if arguments.write:
        write_results("host_tier", figures)


def _measure(folder: Path, group: str | None, kills: int) -> dict[str, object]:
    ray_folder = prepare()  # before Ray is imported
    import ray

    slot_bytes = expert_bytes(CONFIG, torch.float32, None)
    budget = (len(KEYS) + 1) * slot_bytes
    start(ray_folder, 4, object_store_bytes(3 * budget))
    remote = ray.remote(Replica).options(num_cpus=0)

    def replica(model: str):
        return remote.remote(str(folder), model, budget, group)

    def used() -> int:
        total = ray.cluster_resources()["object_store_memory"]
        time.sleep(4)  # Ray counts now and then
        return int(total - ray.available_resources()["object_store_memory"])

    def fill(one: object) -> list[float]:
        """Read all experts until the node has them."""
        return [s for _ in range(2) for s in ray.get(one.read.remote("host", KEYS))]

    before = used()
    first, second = replica("shared"), replica("shared")
    fill(first)
    fill(second)
    shared = used() - before
    reads = {"first": ray.get(first.reads.remote()), "second": ray.get(second.reads.remote())}
    disk = [s for _ in range(TURNS) for s in ray.get(second.read.remote("disk", KEYS))]
    host = [s for _ in range(TURNS) for s in ray.get(second.read.remote("host", KEYS))]
    exact = [ray.get(second.is_exact.remote(key)) for key in KEYS]
    for _ in range(kills):
        victim = replica("shared")
        pid = ray.get(victim.pid.remote())
        victim.read_for_ever.remote()
        time.sleep(0.7)
        os.kill(pid, signal.SIGKILL)
        exact += [ray.get(second.is_exact.remote(key)) for key in KEYS]
    before = used()
    for model in ("alone_1", "alone_2"):
        fill(replica(model))
    alone = used() - before
    ray.shutdown()
    return {
        "expert_bytes": slot_bytes,
        "experts": len(KEYS),
        "shared_memory_of_two_replicas": shared,
        "shared_memory_of_two_replicas_that_do_not_share": alone,
        "reads": reads,
        "disk_ms": _spread(disk),
        "host_ms": _spread(host),
        "kills": kills,
        "exact_fills": sum(exact),
        "fills": len(exact),
    }


def _spread(seconds: list[float]) -> dict[str, float]:
    ms = sorted(1000 * s for s in seconds)
    return {
        "median": round(statistics.median(ms), 2),
        "best": round(ms[0], 2),
        "worst": round(ms[-1], 2),
    }


def _write_model(folder: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "serving"))
    from small_model import write_random_model

    write_random_model(folder, CONFIG)


def _limit(folder: Path, rate: int) -> str | None:
    """Make a control group that reads ``rate`` bytes/s from the folder's device, if possible."""
    device = folder.stat().st_dev
    try:
        GROUP.mkdir(exist_ok=True)
        number = f"{os.major(device)}:{os.minor(device)} {rate}"
        (GROUP / "blkio.throttle.read_bps_device").write_text(number)
    except OSError as error:
        print(f"the disk is not limited: {error.strerror}")
        return None
    return str(GROUP)


def _lines(figures: dict) -> list[str]:
    mib = 1 << 20
    shared = figures["shared_memory_of_two_replicas"]
    alone = figures["shared_memory_of_two_replicas_that_do_not_share"]
    disk, host = figures["disk_ms"], figures["host_ms"]
    reads = figures["reads"]
    return [
        f"{figures['experts']} experts of {figures['expert_bytes'] / mib:.1f} MiB, two replicas; "
        f"disk limited to {figures['disk_limit_bytes_per_s']} bytes/s",
        f"shared memory: {shared / mib:.0f} MiB when they share, {alone / mib:.0f} MiB when not",
        f"reads: first replica {reads['first']}, second {reads['second']}",
        f"an expert from the disk: {disk['median']} ms (best {disk['best']}, worst "
        f"{disk['worst']})",
        f"an expert from host memory: {host['median']} ms (best {host['best']}, worst "
        f"{host['worst']}), {disk['median'] / host['median']:.1f} times as fast",
        f"replicas killed while they read: {figures['kills']}; exact fills afterwards: "
        f"{figures['exact_fills']} of {figures['fills']}",
    ]


if __name__ == "__main__":
    main()
