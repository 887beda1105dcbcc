"""One rank of the shared-memory tests.

    shared_worker.py CASES RANK RANKS STORE_FILE

Runs cases, joined by commas, and prints "done", or the sentence of the error that ended them. Not
under torchrun, which would end the others itself when a rank is killed.
"""

import os
import random
import resource
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from moeyard.errors import TrainingError
from moeyard.parallel.experts.exchange import GroupExchange, SharedExchange
from moeyard.parallel.host import shared_memory
from moeyard.parallel.host.group import CHUNK, HostGroup, SharedSum
from moeyard.parallel.mesh import build_mesh

LIMIT_S = 60
SMALL = 1 << 20
SIZES = (1, 63, CHUNK, 3 * CHUNK + 17)


def joined(group=None, timeout_s: float = LIMIT_S) -> HostGroup:
    host = HostGroup.join(group or dist.group.WORLD, timeout_s)
    assert host is not None, "the ranks are on one host"
    return host


def ordered_sum(tensor: torch.Tensor, group) -> torch.Tensor:
    everyone = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, tensor, group=group)
    total = everyone[0]
    for other in everyone[1:]:
        total = total + other
    return total


def check_sum(host: HostGroup, numel: int, dtype: torch.dtype, generator) -> None:
    shared = SharedSum.create(host, numel, dtype)
    assert shared is not None
    assert torch.equal(shared.local, torch.zeros(numel, dtype=dtype))
    for turn in range(4):
        values = torch.randn(numel, generator=generator).to(dtype)
        shared.local.copy_(values)
        time.sleep(random.random() * 0.01)
        shared.all_reduce()
        found = shared.local.clone()  # before gloo makes the ranks wait for each other
        by_gloo = values.clone()
        dist.all_reduce(by_gloo, group=host.group)
        assert torch.equal(found, ordered_sum(values, host.group)), (numel, dtype, turn)
        if host.size == 2:
            assert torch.equal(found, by_gloo)
        elif dtype == torch.float64:
            difference = (found - by_gloo).abs().max()
            assert difference <= 1e-15 * host.size * by_gloo.abs().max().clamp(min=1)


def sums() -> None:
    host = joined()
    generator = torch.Generator().manual_seed(host.rank)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for numel in SIZES:
            check_sum(host, numel, dtype, generator)


def columns_of(num_rows: int, generator) -> list[torch.Tensor]:
    x = torch.randn(num_rows, 7, generator=generator)
    return [x.bfloat16(), x.double()[:, :3].contiguous(), torch.arange(num_rows).int()[:, None]]


def check_exchanges(exchange, host: HostGroup, turns: int) -> None:
    expected_of = GroupExchange(host.group)
    generator = torch.Generator().manual_seed(host.rank)
    for turn in range(turns):
        most = (0, 5, 40, 2000)[turn % 4]  # grows twice, and now and then no rank sends
        chunks = [
            [random.randint(0, most) * random.randint(0, 1) for _ in range(host.size)]
            for _ in range(1 + turn % 3)
        ]
        found = exchange.splits(chunks)
        assert found == expected_of.splits(chunks)
        splits, send = found[-1], chunks[-1]
        columns = columns_of(50, generator)
        order = torch.randint(0, 50, (sum(send),), generator=generator)
        time.sleep(random.random() * 0.005)
        received = exchange.rows(columns, splits, order)
        received = [[part.clone() for part in parts] for parts in received]
        returned = exchange.rows([torch.cat(parts) for parts in received], splits.reversed())
        for column, parts, back in zip(columns, received, returned, strict=True):
            assert [len(part) for part in parts] == splits.received_by(host.rank)
            assert torch.equal(torch.cat(back), column[order])
            expected = expected_of.rows([column], splits, order)[0]
            assert all(torch.equal(a, b) for a, b in zip(parts, expected, strict=True))


def exchanges() -> None:
    host = joined()
    random.seed(host.rank)
    exchange = SharedExchange(host)
    check_exchanges(exchange, host, 40)
    assert exchange._otherwise is None


def two_groups() -> None:
    mesh = build_mesh(2, 4, timeout_s=LIMIT_S)
    assert mesh.groups_sharing_memory == "dp,ep,edp"
    generator = torch.Generator().manual_seed(mesh.rank)
    random.seed(mesh.rank)
    for _ in range(3):
        for host in (mesh.dp_host, mesh.ep_host, mesh.edp_host):
            check_sum(host, CHUNK + 1, torch.float32, generator)
            check_exchanges(SharedExchange(host), host, 4)


def killed() -> None:
    host = joined()
    shared = SharedSum.create(host, 1000, torch.float32)
    shared.all_reduce()
    maps = Path("/proc/self/maps").read_text().splitlines()
    named = [line.split(maxsplit=5)[5] for line in maps if "moeyard" in line and ".py" not in line]
    assert named and set(named) == {"/memfd:moeyard (deleted)"}, named
    if host.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    shared.all_reduce()


def late() -> None:
    host = joined(timeout_s=0.5)
    host.barrier()
    if host.rank == 1:
        time.sleep(5)
    else:
        host.barrier()


def limit_files(num_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))


def no_room() -> None:
    """Memory runs out on one rank, step by step; all ranks must go on alike."""
    host = joined()
    random.seed(host.rank)
    exchange = SharedExchange(host)
    check_exchanges(exchange, host, 2)
    if host.rank == 1:
        limit_files(SMALL)
    assert SharedSum.create(host, SMALL, torch.float32) is None
    assert SharedSum.create(host, 100, torch.float32) is not None
    if host.rank == 1:
        limit_files(1)
    check_exchanges(exchange, host, 8)
    assert exchange._otherwise is not None
    assert HostGroup.join(dist.group.WORLD, LIMIT_S) is None
    limit_files(resource.RLIM_INFINITY)  # the store is a file


def two_hosts() -> None:
    if dist.get_rank() == 1:
        shared_memory._facts_of_host = lambda: [1, 2]
    mesh = build_mesh(2, 4, timeout_s=LIMIT_S)
    assert mesh.groups_sharing_memory == "none"


def main() -> None:
    cases, rank, ranks, store = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=LIMIT_S),
    )
    try:
        for case in cases.split(","):
            globals()[case]()
    except TrainingError as error:
        print(error)
        return
    dist.barrier()
    print("done")


if __name__ == "__main__":
    main()
