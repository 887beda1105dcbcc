"""One text from a model whose experts are divided between two processes, against one process.

All processes are on one host, and all read experts from one disk of the given speed: a read waits
until the reads before it, of whatever process, have had their time (paced_disk.py). The bytes
themselves come from the page cache. An arm is a number of owners and the memory that EACH owner has
for experts, as a share of all experts of the model. So two owners of 25 % hold 50 % together.

Arms take turns. In a turn all of them draw the same text with the same seed, and a text that
differs ends the benchmark. Owners are plain processes: Ray only starts and watches them.

    python benchmarks/expert_parallel_serving.py MODEL_DIR --mb-s 500 --write NAME
    python benchmarks/expert_parallel_serving.py MODEL_DIR --resident --tokens 32
    python benchmarks/expert_parallel_serving.py MODEL_DIR --thread-counts --tokens 32
    python benchmarks/expert_parallel_serving.py MODEL_DIR --frames 3000
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from paced_disk import PacedDisk

from moeyard.moe.models.language_model import LanguageModel
from moeyard.serving.expert_parallel.connecting import Address, connect, host_identity
from moeyard.serving.expert_parallel.frames import Head, Kind
from moeyard.serving.expert_parallel.local_owners import LocalOwners
from moeyard.serving.expert_parallel.sharding import ShardedModel
from moeyard.serving.experts.options import StoreOptions
from moeyard.serving.experts.store import ExpertStore
from moeyard.serving.loading import open_model

from report import write_results

SECRET = b"of one benchmark"
OWNER = Path(__file__).parent / "expert_parallel_owner.py"
ARMS = {
    "one 25%": (1, "25%", True),
    "two 25%": (2, "25%", True),
    "one 50%": (1, "50%", True),
    "two 12.5%": (2, "12.5%", True),
}
RESIDENT = {
    "one, all in memory": (1, None, True),
    "one, all in slots": (1, "100%", True),
    "two, all in memory": (2, None, True),
    "two, all in memory, TCP": (2, None, False),
}
"""Name: owners, memory of each, and whether the owner knows that it is on the leader's host."""
THREADS = {
    "one, all in memory": (1, None, True),
    "two, 2 + 2 threads": (2, None, True, 2, 2),
    "two, 2 + 1 threads": (2, None, True, 2, 1),
    "two, 1 + 1 threads": (2, None, True, 1, 1),
}
"""The same, with the threads of the leader and of the owner."""


@dataclass
class Arm:
    """An open model and what its turns took."""

    model: LanguageModel
    store: ExpertStore | None
    sharding: ShardedModel | None
    threads: int
    """Of this process in the arm's turns."""
    seconds: list[float] = field(default_factory=list)
    bytes_read: list[int] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)

    def cpu_so_far(self) -> float:
        """Return the seconds of processors that this process and the owner have used."""
        used = time.process_time()
        if self.sharding is not None:
            stat = Path(f"/proc/{self.sharding.hiring.pid(1)}/stat").read_text().rpartition(")")[2]
            used += sum(map(int, stat.split()[11:13])) / os.sysconf("SC_CLK_TCK")
        return used

    def read_so_far(self) -> int:
        """Return the bytes of experts that all owners have read."""
        total = 0
        if self.store is not None:
            total = sum(layer.bytes_read for layer in self.store.statistics.layers.values())
        if self.sharding is not None:
            owner = self.sharding.team.metrics.owners[1]
            total += int(owner._store["bytes_read"]._value.get())
        return total


def open_arm(name: str, arguments: argparse.Namespace, shared: Path) -> Arm:
    owners, memory, is_local, *threads = {**ARMS, **RESIDENT, **THREADS}[name]
    leader_threads, owner_threads = threads or (arguments.threads, arguments.owner_threads)
    sharding = None
    if owners > 1:
        command = [sys.executable, str(OWNER), str(arguments.mb_s), str(shared)]
        where = {} if is_local else {"leaders_host": "another host"}
        where["num_threads"] = owner_threads or leader_threads
        sharding = ShardedModel(owners, LocalOwners(command), reader="buffered", **where)
    options = StoreOptions(reader="buffered", sharding=sharding)
    model, store = open_model(arguments.model, "bf16", expert_memory=memory, options=options)
    return Arm(model, store, sharding, leader_threads)


def turn(arm: Arm, arguments: argparse.Namespace, seed: int) -> str:
    """Draw a text; note the seconds and the bytes."""
    torch.set_num_threads(arm.threads)
    used, before, started = arm.cpu_so_far(), arm.read_so_far(), time.perf_counter()
    drawn = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": seed, "ignore_eos": True}
    text = "".join(arm.model.stream("The", arguments.tokens, **drawn))
    arm.seconds.append(time.perf_counter() - started)
    arm.bytes_read.append(arm.read_so_far() - before)
    arm.cpu_s.append(arm.cpu_so_far() - used)
    return text


def round_trips(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return the microseconds of a frame there and back, between two processes of this host.

    Rows of width 1024 in bf16 go there, two fp32 lines for each come back.
    """
    found = {}
    for carrier, host in (("shared", host_identity()), ("TCP", "another host")):
        command = [sys.executable, str(OWNER), "echo", host, SECRET.hex()]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        channel, _ = connect(Address(*json.loads(child.stdout.readline())), SECRET)
        for rows in (1, 8, 256):
            x_nD, seconds = torch.zeros(rows, 1024, dtype=torch.bfloat16), []
            for _ in range(arguments.frames):
                started = time.perf_counter()
                channel.send(Head(Kind.COMPUTE, rows=2 * rows), [x_nD])
                channel.receive()
                seconds.append(time.perf_counter() - started)
            ranked = sorted(1e6 * s for s in seconds)
            found[f"{carrier}, {rows} rows"] = {
                "p50_us": round(ranked[len(ranked) // 2], 1),
                "p90_us": round(ranked[len(ranked) * 9 // 10], 1),
                "p99_us": round(ranked[len(ranked) * 99 // 100], 1),
            }
        channel.close()
        child.wait(10)
    return found


def measure(names: list[str], arguments: argparse.Namespace, turns: int) -> dict:
    """Let arms take turns and return what came of each."""
    with tempfile.TemporaryDirectory() as folder:
        shared = Path(folder) / "disk"
        disk = PacedDisk(arguments.mb_s * 1e6 or None, shared)
        arms = {name: open_arm(name, arguments, shared) for name in names}
        for seed in range(-1, turns):  # the first turn fills the slots
            texts = {name: turn(arm, arguments, seed + 1000) for name, arm in arms.items()}
            if len(set(texts.values())) > 1:
                raise SystemExit(f"texts differ in turn {seed}: {texts}")
        found = {}
        for name, arm in arms.items():
            rates = [arguments.tokens / s for s in arm.seconds[1:]]
            found[name] = {
                "tokens_per_s": [round(rate, 3) for rate in rates],
                "median": round(statistics.median(rates), 3),
                "mb_per_token": round(
                    statistics.mean(arm.bytes_read[1:]) / arguments.tokens / 1e6, 1
                ),
                "cpu_ms_per_token": round(
                    1e3 * statistics.mean(arm.cpu_s[1:]) / arguments.tokens, 1
                ),
            }
            if arm.sharding is not None:
                owner = arm.sharding.team.metrics.owners[1]
                questions = sum(bucket.get() for bucket in owner._round_trip._buckets)
                for way in ("sent", "received"):
                    num_bytes = getattr(owner, way)._value.get()
                    found[name][f"{way}_per_layer"] = round(num_bytes / questions)
                round_trips_s, owner_s = owner._round_trip._sum.get(), owner._compute._value.get()
                found[name]["round_trip_us"] = round(1e6 * round_trips_s / questions)
                found[name]["of_it_owner_us"] = round(1e6 * owner_s / questions)
                arm.sharding.close()
        disk.bytes_per_s = None
        return found


def show(found: dict, first: str) -> None:
    base = found[first]["tokens_per_s"]
    for name, values in found.items():
        ratios = [a / b for a, b in zip(values["tokens_per_s"], base, strict=True)]
        others = {k: v for k, v in values.items() if k not in ("tokens_per_s", "median")}
        print(
            f"{name:26} {values['median']:7.2f} tokens/s  x{statistics.median(ratios):.2f} "
            f"(pairs {min(ratios):.2f} to {max(ratios):.2f})  {others}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--mb-s", type=float, default=500, help="of the disk; 0 = unlimited")
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="of a leader")
    parser.add_argument("--owner-threads", type=int, help="default: as many as a leader")
    parser.add_argument("--resident", action="store_true", help="all experts in memory")
    parser.add_argument(
        "--thread-counts", action="store_true", help="the same, with other numbers of threads"
    )
    parser.add_argument("--frames", type=int, help="measure only so many round trips of each kind")
    parser.add_argument("--write", metavar="NAME", help="write the JSON under this name")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.frames is not None:
        for name, values in round_trips(arguments).items():
            print(f"{name:20} {values}")
        return
    names = list(RESIDENT if arguments.resident else ARMS)
    if arguments.thread_counts:
        names = list(THREADS)
    if arguments.resident or arguments.thread_counts:
        arguments.mb_s = 0
    found = measure(names, arguments, arguments.turns)
    print(f"disk {arguments.mb_s:g} MB/s, {arguments.tokens} tokens a turn, texts equal")
    show(found, names[0])
    if arguments.write:
        values = vars(arguments) | {"model": arguments.model.name}
        write_results(arguments.write, {"arguments": values, "arms": found})


if __name__ == "__main__":
    main()
