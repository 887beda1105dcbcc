"""What reading experts costs the CPU: by Python and by C++, on demand and ahead.

    python benchmarks/expert_read_cpu.py MODEL_DIR --budget 50% --rate 1600

All arms are open in one process and take turns, so that load of the machine meets all of them. For
each arm, medians over turns, by token: seconds of the clock and of the CPU (the thread that
computes, and the whole process with reading threads and kernels that wait for work), seconds that
compute waited for reads, experts that it waited for, and reads that began ahead. The disk has the
given rate and no credit (paced_disk.py). Texts must be equal.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from paced_disk import PacedDisk

from moeyard.serving.experts.options import StoreOptions
from moeyard.serving.experts.predictors.switch import AlwaysOn
from moeyard.serving.experts.reading.native import library
from moeyard.serving.loading import open_model

ARMS = ("resident", "all in slots, C++", "on demand, Python", "on demand, C++", "ahead, Python",
        "ahead, C++")  # fmt: skip
COLUMNS = ("clock", "compute CPU", "process CPU", "stall")


def open_arm(name: str, arguments: argparse.Namespace):
    """Return the model and the store of an arm."""
    if name == "resident":
        return open_model(arguments.model, arguments.dtype)
    kind, reader = name.split(", ")
    loaded = library.load()
    library._loaded[:] = [loaded if reader == "C++" else None]
    predictor = arguments.predictor if kind == "ahead" else "none"
    options = StoreOptions(policy="lru", reader="direct", predictor=predictor)
    memory = "100%" if kind == "all in slots" else arguments.budget
    model, store = open_model(
        arguments.model, arguments.dtype, expert_memory=memory, options=options
    )
    library._loaded[:] = [loaded]
    if kind == "ahead":
        store._ahead._switch = AlwaysOn()
    return model, store


def counts(store) -> list[float]:
    """Return stall seconds, experts waited for and reads ahead so far."""
    if store is None:
        return [0.0] * 3
    layers = store.statistics.layers.values()
    issued = sum(layer.prefetch_issued for layer in layers)
    return [store.statistics.stall_s, store.statistics.num_waits(), issued]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--budget", default="50%")
    parser.add_argument("--rate", type=float, default=1600, help="MB/s")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--predictor", default="next_gates")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    PacedDisk(arguments.rate * 1e6)
    arms = {name: open_arm(name, arguments) for name in arguments.arms}
    rows: dict[str, list[list[float]]] = {name: [] for name in arms}
    texts = set()
    for turn in range(1 + arguments.turns):
        for name, (model, store) in arms.items():
            before = counts(store)
            starts = [time.perf_counter(), time.thread_time(), time.process_time()]
            drawn = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": min(turn, 1)}
            text = "".join(model.stream("The", arguments.tokens, **drawn, ignore_eos=True))
            ends = [time.perf_counter(), time.thread_time(), time.process_time()]
            spent = [*ends, *counts(store)], [*starts, *before]
            if turn:  # the first one fills the slots
                texts.add(text)
                rows[name].append([(b - a) / arguments.tokens for b, a in zip(*spent, strict=True)])
    assert len(texts) == 1, "arms gave different texts"
    for name in arms:
        medians = [statistics.median(values) for values in zip(*rows[name], strict=True)]
        times = zip(COLUMNS, medians, strict=False)
        shown = "  ".join(f"{column} {1e3 * seconds:6.2f} ms" for column, seconds in times)
        print(
            f"{name:18} {shown}  waited for {medians[4]:4.1f}  ahead {medians[5]:4.1f}", flush=True
        )


if __name__ == "__main__":
    main()
