"""Passes over all experts of a folder: by the device alone, and by the store into its slots."""

import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from moeyard.kernels.values.expert_weights import empty_slots
from moeyard.moe.folders.extents import Chunk
from moeyard.moe.folders.file_reader import Buffer, buffer_of
from moeyard.moe.folders.folder import ModelFolder
from moeyard.serving.experts.opening import open_store
from moeyard.serving.experts.options import StoreOptions

PASS_S = 1.0
"""A pass reads all again until it took this long: limits let bursts pass."""


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
