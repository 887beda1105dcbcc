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
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from moeyard.moe.folders.folder import ModelFolder

from expert_extents import config_of, write
from expert_passes import StorePass, long_rate, read_plainly

RESULTS = Path(__file__).parent / "results"
GROUP = Path("/sys/fs/cgroup/blkio/expert-reads")
LIMITS_MB = (200, 400, 800, 0)
SIZES = {"9.4 MB": (1024, 1536, 2, 16), "393 KB": (256, 256, 4, 128)}
"""By size of an expert: widths of model and expert, layers, experts of a layer."""
PASSES = 3


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
