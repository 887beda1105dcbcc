"""How fast this machine reads memory."""

import time

import torch

BUFFER_BYTES = 256 << 20
"""Larger than caches are."""
TIMES = 3


def memory_bandwidth() -> float:
    """Measure bytes per second that torch's threads read; takes about a tenth of a second."""
    buffer = torch.ones(BUFFER_BYTES // 8, dtype=torch.int64)
    best_s = float("inf")
    for _ in range(TIMES):
        started = time.perf_counter()
        buffer.sum()
        best_s = min(best_s, time.perf_counter() - started)
    return BUFFER_BYTES / best_s
