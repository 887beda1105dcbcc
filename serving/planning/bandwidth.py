"""How fast this machine reads memory."""

import time

import torch

BUFFER_BYTES = 64 << 20
"""Larger than the caches that one process gets, and still little next to a model."""
TIMES = 8


def memory_bandwidth() -> float:
    """Measure bytes per second that torch's threads read; takes a few hundredths of a second."""
    buffer = torch.ones(BUFFER_BYTES // 8, dtype=torch.int64)
    best_s = float("inf")
    for _ in range(TIMES):
        started = time.perf_counter()
        buffer.sum()
        best_s = min(best_s, time.perf_counter() - started)
    return BUFFER_BYTES / best_s
