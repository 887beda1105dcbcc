"""Why a step of the engine is slower in a server: one candidate after the other, in one process.

    python benchmarks/engine_thread.py [--model DIR] [--steps 300] [--rounds 5]

The same greedy streams in every arm; arms take turns. Printed: microseconds of the engine's thread
per step, as CPU time and by the clock, and how often it waited, was preempted and touched a new
page, per step. Medians over rounds.

    main       steps in the main thread
    thread     in another thread; the main thread waits
    woken      that thread wakes an event loop after every step, which does nothing
    worked     the loop then computes for 100 us, as it did when it worded and sent every chunk
    sent       that thread words the chunk itself and sends it to another process; the loop sleeps
    collected  a heap of a million objects, as after Ray's imports, is searched for garbage
    nice       at priority 15, as Ray starts its workers
"""

import argparse
import asyncio
import gc
import os
import socket
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from token_path_arms import engine_of, write_demo_model
from token_path_client import COUNTS, of_thread

from moeyard.serving.api.chunks import Chunks
from moeyard.serving.api.completions import CompletionWording, parse_completion
from moeyard.serving.api.outlets import PlainChunks
from moeyard.serving.relay.link import Link
from moeyard.serving.relay.sender import RelayedStream

Step = Callable[[], Any]
Figures = dict[str, float]
WORK_S = 100e-6
NICENESS = 15


def measured(step: Step, num_steps: int) -> Figures:
    """Run steps in this thread; return what one costs it."""
    before, started = of_thread(os.getpid(), threading.get_native_id()), time.perf_counter()
    for _ in range(num_steps):
        step()
    seconds = time.perf_counter() - started
    after = of_thread(os.getpid(), threading.get_native_id())
    spent = {name: (after[i] - before[i]) / num_steps for i, name in enumerate(COUNTS)}
    return {"clock_us": seconds / num_steps * 1e6, "cpu_us": spent.pop("cpu_ns") / 1000, **spent}


def in_thread(step: Step, num_steps: int) -> Figures:
    """Run steps in another thread."""
    found: list[Figures] = []
    thread = threading.Thread(target=lambda: found.append(measured(step, num_steps)))
    thread.start()
    thread.join()
    return found[0]


def beside_loop(step: Step, num_steps: int, on_wake: Callable[[], None]) -> Figures:
    """Run steps in another thread, which wakes this one's event loop after each."""

    async def wait() -> Figures:
        loop = asyncio.get_running_loop()

        def step_and_tell() -> None:
            step()
            loop.call_soon_threadsafe(on_wake)

        return await asyncio.to_thread(measured, step_and_tell, num_steps)

    return asyncio.run(wait())


def sending(step: Step, num_steps: int) -> Figures:
    """Run steps in another thread, which sends their chunks by the short way."""

    async def wait() -> Figures:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        ours.setblocking(False)
        link = Link(ours)
        wording = CompletionWording(parse_completion(b'{"model": "m", "prompt": "a"}'), None)
        chunks = Chunks({"id": "cmpl-0", "object": "o", "model": "m", "choices": []}, wording)
        outlet = PlainChunks(chunks, RelayedStream(link, 1))

        def step_and_send() -> None:
            for index, event in enumerate(step()):
                outlet.take(index, event)
            outlet.flush()

        with subprocess.Popen(["cat"], stdin=theirs, stdout=subprocess.DEVNULL), theirs:
            theirs.close()
            try:
                return await asyncio.to_thread(measured, step_and_send, num_steps)
            finally:
                link.close()

    return asyncio.run(wait())


def work() -> None:
    """Compute in Python for a while."""
    end = time.thread_time() + WORK_S
    while time.thread_time() < end:
        pass


def with_heap(step: Step, num_steps: int) -> Figures:
    """Run steps while there are many objects that the collector looks at."""
    heap = [{"index": i} for i in range(1_000_000)]
    try:
        return in_thread(step, num_steps)
    finally:
        heap.clear()
        gc.collect()


def nicely(step: Step, num_steps: int) -> Figures:
    """Run steps in a thread of low priority; only the kernel's superuser gets it back."""

    def lower() -> Figures:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        return measured(step, num_steps)

    found: list[Figures] = []
    thread = threading.Thread(target=lambda: found.append(lower()))
    thread.start()
    thread.join()
    return found[0]


ARMS: dict[str, Callable[[Step, int], Figures]] = {
    "main": measured,
    "thread": in_thread,
    "woken": lambda step, n: beside_loop(step, n, lambda: None),
    "worked": lambda step, n: beside_loop(step, n, work),
    "sent": sending,
    "collected": with_heap,
    "nice": nicely,
}


def main() -> None:
    """Let the arms take turns."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[Figures]] = {arm: [] for arm in args.arms}
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or str(Path(folder) / "demo-shape")
        if args.model is None:
            write_demo_model(Path(model))
        for arm in args.arms * args.rounds:
            with engine_of(model, args.streams) as engine:
                found[arm].append(ARMS[arm](engine.step, args.steps))
    for arm, rounds in found.items():
        medians = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
        words = "  ".join(f"{name} {value:8.2f}" for name, value in medians.items())
        print(f"{arm:10} {words}")


if __name__ == "__main__":
    main()
