"""What a rank of the slow network measures of it; started by benchmarks/network.py.

python network_case.py links|compute

Rank 0 prints one line of JSON.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

SIZES = [4 << 10, 64 << 10, 512 << 10, 4 << 20, 8 << 20]
"""Bytes of a message; those that a rank sends in all of an all-to-all."""
COMPUTE_S = 2.0


def median_over(repeats: int, exchange: Callable[[], object]) -> float:
    """Return the median seconds of an exchange, each time those of the slowest rank."""
    seconds_R = torch.empty(repeats, dtype=torch.float64)
    for repeat in range(repeats + 1):  # the first one opens connections
        dist.barrier()
        started = time.perf_counter()
        exchange()
        seconds_R[max(repeat - 1, 0)] = time.perf_counter() - started
    dist.all_reduce(seconds_R, op=dist.ReduceOp.MAX)
    return seconds_R.median().item()


def ping_pong(message: torch.Tensor, first: int, second: int) -> None:
    """Send a message from one rank to another and back."""
    rank = dist.get_rank()
    if rank == first:
        dist.send(message, second)
        dist.recv(message, second)
    elif rank == second:
        dist.recv(message, first)
        dist.send(message, first)


def swap(message: torch.Tensor, received: torch.Tensor, peer: int) -> None:
    """Send a message to a rank while one of equal size comes from it.

    All post their receives before any sends, because otherwise gloo's directions often take turns.
    """
    receiving = dist.irecv(received, peer)
    dist.barrier()
    sending = dist.isend(message, peer)
    assert receiving is not None and sending is not None
    receiving.wait()
    sending.wait()


class Links:
    """Times of exchanges: for every kind of them [bytes over the busiest link, seconds] by size.

    ``node0_bytes`` are those that the ranks of node 0 have sent to the other node.
    """

    def __init__(self) -> None:
        self.world, self.per_node = dist.get_world_size(), int(os.environ["LOCAL_WORLD_SIZE"])
        self.exchanges: dict[str, list[tuple[int, float]]] = {}
        self.node0_bytes = 0

    def measure(self) -> None:
        between = self.per_node  # the first rank of node 1
        self.time("one pair between nodes", 1, lambda m, _: ping_pong(m, 0, between), ways=2)
        if self.per_node > 1:
            self.time("one pair inside a node", 0, lambda m, _: ping_pong(m, 0, 1), ways=2)
            peer = (dist.get_rank() + self.per_node) % self.world
            name = f"{self.per_node} pairs between nodes at once"
            self.time(name, self.per_node, lambda m, r: swap(m, r, peer))
        leaving = self.per_node * (self.world - self.per_node) / self.world
        self.time("all to all", leaving, lambda m, r: dist.all_to_all_single(r, m))

    def time(
        self,
        name: str,
        leaving: float,
        exchange: Callable[[torch.Tensor, torch.Tensor], object],
        ways: int = 1,
    ) -> None:
        """Time one kind, where a node sends ``leaving`` messages over its link, ``ways`` times."""
        self.exchanges[name] = []
        for size in SIZES:
            message, received = torch.zeros(size // 4), torch.empty(size // 4)
            repeats = 20 if size < 1 << 20 else 5
            seconds = median_over(repeats, lambda m=message, r=received: exchange(m, r)) / ways
            self.exchanges[name].append((round((leaving or 1) * size), seconds))
            self.node0_bytes += round((repeats + 1) * leaving * size)


def measure_links() -> dict[str, Any]:
    """Return the times of all kinds and the bytes that they sent."""
    links = Links()
    links.measure()
    return {"exchanges": links.exchanges, "node0_bytes": links.node0_bytes}


def multiply(seconds: float) -> dict[str, float]:
    """Multiply matrices for a while; return products a second and the cores used."""
    matrix = torch.randn(192, 192)
    started, used, count = time.perf_counter(), time.process_time(), 0
    while (elapsed := time.perf_counter() - started) < seconds:
        matrix @ matrix
        count += 1
    return {"products_per_s": count / elapsed, "cores": (time.process_time() - used) / elapsed}


def measure_compute() -> dict[str, Any]:
    """Return what rank 0 computes while the others wait, and what each does when all are busy."""
    dist.barrier()
    alone = multiply(COMPUTE_S) if dist.get_rank() == 0 else None
    dist.barrier()
    busy: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(busy, multiply(COMPUTE_S))
    return {"alone": alone, "all_busy": busy}


def main() -> None:
    dist.init_process_group("gloo")
    found = measure_links() if sys.argv[1] == "links" else measure_compute()
    if dist.get_rank() == 0:
        print(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
