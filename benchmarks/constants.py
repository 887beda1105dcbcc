"""Measure the constants in the code.

    python benchmarks/constants.py

1. kernels/torch_ops/loop.py: F.grouped_mm against a loop of torch.mm, interleaved, medians.
2. kernels/torch_ops/row_stable.py: for which numbers of rows F.linear gives other bits
   than in a large call.
3. training/run/allocator.py: a training step with and without keeping freed memory, interleaved.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from report import write_results

STEP = """
import sys, time
from pathlib import Path
from moeyard.parallel.mesh import Mesh
from moeyard.training.run.allocator import keep_freed_memory
from moeyard.training.read_config import read_run_config
from moeyard.training.trainer import Trainer
if sys.argv[3] == "kept":
    keep_freed_memory()
options = [f"run_dir={sys.argv[2]}", "train.batch_sequences=8"]
config = read_run_config(Path(sys.argv[1]), options)
step = Trainer(config, Path(sys.argv[2]), Mesh())._step
times = []
for index in range(13):
    started = time.perf_counter()
    step.run(index, False)
    times.append(time.perf_counter() - started)
print(sorted(times[3:])[5])
"""


def grouped_against_loop() -> list[dict]:
    """Return medians in ms, 2 a group and 256 a group."""
    table = []
    for dtype in (torch.float32, torch.bfloat16):
        for rows in (64, 8192):
            weight = torch.randn(32, 512, 512).to(dtype)
            x = torch.randn(rows, 512).to(dtype)
            bounds = torch.arange(0, rows + 1, rows // 32).tolist()
            ends = torch.tensor(bounds[1:], dtype=torch.int32)
            out = torch.empty(rows, 512, dtype=dtype)

            def loop(x=x, weight=weight, bounds=bounds, out=out):
                for e in range(32):
                    rows = slice(bounds[e], bounds[e + 1])
                    torch.mm(x[rows], weight[e].t(), out=out[rows])

            def fused(x=x, weight=weight, ends=ends):
                F.grouped_mm(x, weight.transpose(1, 2), offs=ends)

            times: dict = {loop: [], fused: []}
            for _ in range(21):
                for run, found in times.items():
                    started = time.perf_counter()
                    run()
                    found.append(1e3 * (time.perf_counter() - started))
            entry = {
                "dtype": str(dtype),
                "rows_per_group": rows // 32,
                "loop_ms": statistics.median(times[loop][1:]),
                "grouped_mm_ms": statistics.median(times[fused][1:]),
            }
            entry["grouped_over_loop"] = entry["grouped_mm_ms"] / entry["loop_ms"]
            table.append(entry)
            print("  ".join(f"{k} {v}" for k, v in entry.items()))
    return table


def other_bits() -> list[dict]:
    """Return the numbers of rows whose results differ from those of 400 rows."""
    table = []
    counts = [*range(1, 17), 32, 64, 100, 300]
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for dtype in (torch.float32, torch.bfloat16):
            for width in (128, 512, 1024, 1152, 2048, 4096):
                x, weight = torch.randn(400, width).to(dtype), torch.randn(2048, width).to(dtype)
                whole = F.linear(x, weight)
                starts = range(0, 100, 4)  # many starts, because few elements differ
                other = [
                    n
                    for n in counts
                    if not all(
                        torch.equal(F.linear(x[s : s + n], weight), whole[s : s + n])
                        for s in starts
                    )
                ]
                entry = {"threads": threads, "dtype": str(dtype), "width": width, "rows": other}
                table.append(entry)
                print("  ".join(f"{k} {v}" for k, v in entry.items()))
    return table


def allocator() -> dict:
    """Return the median of three medians of a training step, in ms."""
    config = Path(__file__).parent.parent / "configs" / "train" / "tiny.yaml"
    times: dict[str, list[float]] = {"default": [], "kept": []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(3):
            for kind, found in times.items():
                done = subprocess.run(
                    [sys.executable, "-c", STEP, str(config), f"{folder}/run", kind],
                    env={**os.environ, "OMP_NUM_THREADS": str(os.cpu_count())},
                    capture_output=True,
                    text=True,
                    check=True,
                )
                found.append(1e3 * float(done.stdout))
    figures = {f"{kind}_ms": statistics.median(found) for kind, found in times.items()}
    figures["kept_over_default"] = figures["kept_ms"] / figures["default_ms"]
    print("  ".join(f"{k} {v}" for k, v in figures.items()))
    return figures


def main() -> None:
    torch.manual_seed(0)
    figures = {
        "question": "where do the constants in the code come from",
        "grouped_mm_against_loop": grouped_against_loop(),
        "rows_with_other_bits": other_bits(),
        "training_step": allocator(),
    }
    print(f"written to {write_results('constants', figures)}")


if __name__ == "__main__":
    main()
