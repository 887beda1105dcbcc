"""What it costs to switch the task of a vision model: bytes held, bytes read, time.

Part of vision_tasks.py, which trains the models.
"""

import statistics
import time
from pathlib import Path

import numpy as np

from moeyard.commands.model_folder import model_folder
from moeyard.moe.folders.folder import ModelFolder
from moeyard.serving.experts.pools import pool_sizes
from moeyard.serving.loading import open_kind, pick_dtype

CALLS = 40
EARLY = 8
"""Calls that are not counted."""


def measure_switch(work: Path, tasks: list[str]) -> dict[str, dict]:
    """Compare one model for all tasks, whole and two experts at a time, with a model for each.

    A model for each task is either held next to the others, or opened when its task is asked for.
    """
    images = np.load(work / "held-out.npz")["images"][: CALLS * 2]
    folder = Path(model_folder(str(work / "gates-seed0")))
    found = {}
    for name, memory in (("all experts", None), ("two experts", two_experts(folder))):
        model, store = open_kind(folder, ("vit",), expert_memory=memory)
        held = sum(tensor.nbytes for tensor in model.vit.parameters())
        if store is not None:
            held += store.pools.num_bytes
        found[name] = {"bytes_held": held, **timed(model, store, images, tasks)}
        if store is not None:
            store.close()
    alone = [Path(model_folder(str(work / f"single-{task}-seed0"))) for task in tasks]
    held, open_s = 0, []
    for path in alone:
        started = time.perf_counter()
        model, _ = open_kind(path, ("vit",))
        open_s.append(time.perf_counter() - started)
        held += sum(tensor.nbytes for tensor in model.vit.parameters())
    found["a model for each task"] = {
        "bytes_held": held,
        "open_ms": 1e3 * statistics.median(open_s),
    }
    for name, row in found.items():
        print(name, {key: round(value, 3) for key, value in row.items()})
    return found


def two_experts(folder: Path) -> str:
    """Return the budget that holds two experts."""
    files = ModelFolder(folder)
    (size,) = pool_sizes(files, pick_dtype(files, None))
    files.close()
    return f"{2 * size.slot_bytes}B"


def timed(model, store, images: np.ndarray, tasks: list[str]) -> dict[str, float]:
    """Return the median times of a call that repeats its task and of one that changes it.

    Both kinds take turns on the same images, so that other work on the machine meets both.
    """
    seconds: dict[bool, list[float]] = {True: [], False: []}
    read: dict[bool, list[int]] = {True: [], False: []}
    task = 0
    for call, image in enumerate(images):
        changes = call % 2 == 1
        task = (task + changes) % len(tasks)
        before = bytes_read(store)
        started = time.perf_counter()
        model(image[None], tasks[task])
        if call >= EARLY:
            seconds[changes].append(1e3 * (time.perf_counter() - started))
            read[changes].append(bytes_read(store) - before)
    return {
        "same_task_ms": statistics.median(seconds[False]),
        "other_task_ms": statistics.median(seconds[True]),
        "same_task_bytes_read": statistics.median(read[False]),
        "other_task_bytes_read": statistics.median(read[True]),
    }


def bytes_read(store) -> int:
    """Return the bytes that a store has read so far; 0 without one."""
    if store is None:
        return 0
    return sum(layer.bytes_read for layer in store.statistics.layers.values())
