"""A cluster on one machine whose network is slow on purpose: its API.

    with Network(nodes=2, ranks_per_node=2, inter="1gbit", intra="4gbit") as network:
        finished = network.run(["benchmarks/some_worker.py", "--rows", "4096"])
        finished.traffic.check_sent({"node0": 1_000_000})

``ranks="isolated"``: every rank has a network and a process namespace of its own. moeyard takes it
for a host of its own and sends everything over links::

    rank0 --intra--+                             +--intra-- rank2
                   node0 --inter-- core --inter-- node1
    rank1 --intra--+                             +--intra-- rank3

All ranks of a node share its link to the others, as they share a network card. A rank's link
carries both what stays in the node and what leaves it.

``ranks="together"``: torchrun starts the ranks of a node in one namespace. They exchange through
shared memory, and the only links are those of the nodes.

Rates can be set, delays cannot: the kernels this was made for lack netem. The latency of a message
is that of TCP and of the processes, some tenths of a millisecond. The machine's cores also do the
kernel's work on packets, outside of the ranks' shares.

gloo's directions often take turns: 4 MB both ways between two ranks at 1 Gbit/s reached 0.4 to 0.5
Gbit/s each way in most tries of ``all_to_all_single``, and 0.6 to 0.9 in all tries where receives
were posted before. So repeat what you time.
"""

import os
import signal
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Literal

from moeyard.errors import ConfigError, MoeyardError

import network_links as links
import network_ranks as processes
from network_links import PREFIX
from network_traffic import Traffic

MASTER_PORT = 29500
DEVICE = "eth0"
"""The device of every place where ranks run."""
ENV = {"GLOO_SOCKET_IFNAME": DEVICE, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
"""torch would warn for every connection that an address has no name."""
ENDINGS = (signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Finished:
    """What a run has printed, by rank (``isolated``) or by node (``together``), and its traffic."""

    outputs: list[str]
    traffic: Traffic


class Network:
    """Nodes with ranks, and links between them with a rate; a context manager.

    ``inter`` is the rate of each node's link and ``intra`` that of each isolated rank's, each way.
    A rank gets ``cores / (nodes * ranks_per_node)`` of the machine's cores; unless given, ``cores``
    are all that this process may use. One such network exists at a time on a machine. Everything is
    removed at the end, also after errors, Ctrl-C and SIGTERM, for which it must be entered in the
    main thread. What a killed benchmark left is removed at the next start. Needs root. Raises
    :class:`MoeyardError` where something is missing or not permitted.
    """

    def __init__(
        self,
        nodes: int = 2,
        ranks_per_node: int = 2,
        inter: str = "1gbit",
        intra: str = "4gbit",
        ranks: Literal["isolated", "together"] = "isolated",
        cores: float | None = None,
    ) -> None:
        if nodes < 2 or ranks_per_node < 1 or nodes * ranks_per_node > 250:
            raise ConfigError(
                f"nodes is {nodes} and ranks_per_node {ranks_per_node}; "
                "take 2 nodes or more, 1 rank or more on each, and 250 ranks or fewer."
            )
        if ranks not in ("isolated", "together"):
            raise ConfigError(f"ranks is {ranks!r}; take 'isolated' or 'together'.")
        for rate in (inter, intra):
            links.bits_per_s(rate)
        self.nodes, self.ranks_per_node = nodes, ranks_per_node
        self.inter, self.intra = inter, intra
        self.is_isolated = ranks == "isolated"
        self.world_size = nodes * ranks_per_node
        self.cores_per_rank = (cores or len(os.sched_getaffinity(0))) / self.world_size
        self._running: list[processes.Process] = []
        self._links: dict[str, tuple[tuple[str, str], tuple[str, str]]] = {}
        """Both ends of every link, as (namespace, device)."""
        self._lock: socket.socket | None = None
        self._handlers: dict[int, object] = {}

    def __enter__(self) -> "Network":
        links.stop_unless_permitted()
        self._lock = _only_one()
        self._catch_endings()
        try:
            _remove()
            self._build()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        is_main = threading.current_thread() is threading.main_thread()
        interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN) if is_main else None
        for number in self._handlers:
            signal.signal(number, signal.SIG_IGN)
        try:
            processes.kill(self._running)
            _remove()
        finally:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)  # type: ignore[arg-type]
            if is_main:
                signal.signal(signal.SIGINT, interrupt)
            if self._lock is not None:
                self._lock.close()

    def address(self, rank: int) -> str:
        """Return the address at which other ranks reach ``rank``."""
        return f"10.77.0.{1 + (rank if self.is_isolated else self._node(rank))}"

    def run(
        self, arguments: Sequence[str], env: Mapping[str, str] | None = None, timeout_s: float = 300
    ) -> Finished:
        """Run ``python ARGUMENTS`` once per rank, with torchrun's environment, until all end.

        Raises :class:`MoeyardError` with the output of the first process that fails, or of one that
        takes longer than ``timeout_s``.
        """
        before = self.traffic()
        command = [sys.executable, *arguments]
        try:
            start = self._start_ranks if self.is_isolated else self._start_agents
            start(command, {**os.environ, **ENV, **(env or {})})
            outputs = processes.wait(self._running, timeout_s)
        finally:
            processes.kill(self._running)
            self._running = []
        return Finished(outputs, self.traffic().since(before))

    def traffic(self) -> Traffic:
        """Return the links' counters."""
        sent, received, dropped = {}, {}, {}
        for name, (near, far) in self._links.items():
            sent[name], received[name] = links.read_bytes(*near)
            dropped[name] = links.read_dropped(*near) + links.read_dropped(*far)
        return Traffic(sent, received, dropped)

    def _build(self) -> None:
        links.add_switch(f"{PREFIX}core")
        for node in range(self.nodes):
            name = f"node{node}"
            if self.is_isolated:
                links.add_switch(PREFIX + name)
                self._connect(name, "uplink", "core", self.inter)
                links.plug(PREFIX + name, "uplink")
            else:
                self._add_place(name, node * self.ranks_per_node, "core", self.inter)
        for rank in range(self.world_size):
            processes.add_share(rank, self.cores_per_rank)
            if self.is_isolated:
                self._add_place(f"rank{rank}", rank, f"node{self._node(rank)}", self.intra)

    def _add_place(self, name: str, rank: int, switch: str, rate: str) -> None:
        """Make a namespace where ranks run, with the address of ``rank``."""
        links.add_namespace(PREFIX + name)
        self._connect(name, DEVICE, switch, rate)
        links.set_address(PREFIX + name, DEVICE, self.address(rank))

    def _connect(self, name: str, device: str, switch: str, rate: str) -> None:
        """Join ``name`` to a port of the same name on a switch."""
        near, far = (PREFIX + name, device), (PREFIX + switch, name)
        links.connect(near, far, rate)
        links.plug(*far)
        self._links[name] = (near, far)

    def _node(self, rank: int) -> int:
        return rank // self.ranks_per_node

    def _start_ranks(self, command: list[str], env: dict[str, str]) -> None:
        for rank in range(self.world_size):
            place = {
                "RANK": rank,
                "WORLD_SIZE": self.world_size,
                "LOCAL_RANK": rank % self.ranks_per_node,
                "LOCAL_WORLD_SIZE": self.ranks_per_node,
                "GROUP_RANK": self._node(rank),
                "MASTER_ADDR": self.address(0),
                "MASTER_PORT": MASTER_PORT,
                "TORCHELASTIC_RUN_ID": "network",  # by this, moeyard knows that it is a rank
            }
            own = {**env, **{name: str(value) for name, value in place.items()}}
            name = f"rank {rank}"
            self._running.append(
                processes.start(name, f"{PREFIX}rank{rank}", processes.with_share(command), own)
            )

    def _start_agents(self, command: list[str], env: dict[str, str]) -> None:
        agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(self.nodes)]
        agent += ["--nproc-per-node", str(self.ranks_per_node), "--no-python"]
        agent += ["--master-addr", self.address(0), "--master-port", str(MASTER_PORT)]
        for node in range(self.nodes):
            name = f"torchrun on node {node}"
            whole = [*agent, "--node-rank", str(node), *processes.with_share(command)]
            self._running.append(processes.start(name, f"{PREFIX}node{node}", whole, env))

    def _catch_endings(self) -> None:
        """Turn signals that would end this process at once into an exit that cleans up."""
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, _exit) for number in ENDINGS}


def _exit(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _only_one() -> socket.socket:
    """Return what only one process of a machine can hold, and what no end of it leaves behind."""
    lock = socket.socket(socket.AF_UNIX)
    try:
        lock.bind(f"\0{PREFIX}lock")  # a name without a file
    except OSError:
        lock.close()
        raise MoeyardError(
            "another slow network runs on this machine, and both would share its cores; wait for "
            "its end."
        ) from None
    return lock


def _remove() -> None:
    links.remove_namespaces()
    processes.remove_shares()
