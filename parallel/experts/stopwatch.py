"""Seconds of work on a device, read when the work is done, so that no one waits for a number."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

Elapsed = Callable[[], float]
"""Returns the seconds; on a GPU it waits for the end of the work."""
Stop = Callable[[], Elapsed]
Observe = Callable[[str, Elapsed], None]
"""Gets the name of a phase and its seconds."""


@contextmanager
def timed(observe: Observe | None, phase: str, device: torch.device) -> Iterator[None]:
    """Tell ``observe``, if there is one, how long the work inside takes."""
    if observe is None:
        yield
        return
    stop = start(device)
    yield
    observe(phase, stop())


def start(device: torch.device) -> Stop:
    """Start a watch now, on a GPU when its stream has come here; call the result to stop it."""
    if device.type != "cuda":
        began = time.perf_counter()
        return lambda: _known(time.perf_counter() - began)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()

    def stop() -> Elapsed:
        last.record()

        def elapsed() -> float:
            last.synchronize()
            return first.elapsed_time(last) / 1000

        return elapsed

    return stop


def _known(seconds: float) -> Elapsed:
    return lambda: seconds
