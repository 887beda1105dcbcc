"""What is simulated: a model, a step's batch, and how ranks share both.

W ranks (GPUs), G of them on a node, E experts, P expert-parallel ranks.
"""

import math
from dataclasses import dataclass
from typing import Literal

from ...errors import ConfigError
from ...moe.config.model import ModelConfig
from .cluster import Cluster, Precision

ITEM_BYTES = {"fp64": 8, "fp32": 4, "bf16": 2}
Path = Literal["all_to_all", "all_gather", "hierarchical", "padded", "auto"]


@dataclass(frozen=True, slots=True)
class Workload:
    """A step of training: what a run's configuration says about its time and memory."""

    model: ModelConfig
    """With its vocabulary filled in."""
    sequence_length: int
    batch_sequences: int
    """Of the global batch."""
    accumulation: int
    precision: Precision
    recompute: Literal[True, False, "experts"] = False
    ep: int = 1
    expert_tp: int = 1
    path: Path = "all_to_all"
    chunks: int | Literal["auto"] = 1
    backward_chunks: int | None = None
    dense: str = "ddp"
    has_gradient_slices: bool = False
    ranks_per_node: int | None = None
    """For the hierarchical path; None = the GPUs of a node."""
    copy_bytes: int | None = None
    """Memory of a rank for copies of experts; None = no copies."""
    copy_experts: int | None = None
    """Different experts of a layer that may be copied; None = all."""
    rematerializes: bool = False
    shards_experts: bool = False
    """Whether ranks with the same experts share out their masters and moments (ZeRO-1)."""

    @property
    def item_bytes(self) -> int:
        """Bytes of an activation and of a weight in computation."""
        return ITEM_BYTES[self.precision]

    @property
    def wide_bytes(self) -> int:
        """Bytes of a master weight, a main gradient and a moment."""
        return max(4, self.item_bytes)


@dataclass(frozen=True, slots=True)
class Group:
    """Ranks that exchange something: ``per_node`` of them on each node they are on."""

    size: int
    per_node: int

    @property
    def nodes(self) -> int:
        """Nodes of the group."""
        return self.size // self.per_node


@dataclass(frozen=True, slots=True)
class Fold:
    """How W ranks fold into groups (parallel/mesh.py): slices inside, then experts, then copies."""

    world: Group
    ep: Group
    expert_tp: Group
    edp: Group
    """Ranks that hold the same experts and sum their gradients."""
    tokens: int
    """Of a rank in a micro-batch."""

    @classmethod
    def of(cls, work: Workload, cluster: Cluster, num_gpus: int) -> "Fold":
        """Fold; raise :class:`ConfigError` where the GPUs do not split or do not exist."""
        per_node = _gpus_of_a_node(cluster, num_gpus)
        slices = work.ep * work.expert_tp
        if num_gpus % slices:
            raise ConfigError(
                f"--gpus is {num_gpus}, which parallel.ep = {work.ep}"
                f"{f' times expert_tp = {work.expert_tp}' if work.expert_tp > 1 else ''} does not "
                f"divide; use a multiple of {slices} or lower parallel.ep."
            )
        moe = work.model.moe
        if moe is not None and moe.num_experts % work.ep:
            raise ConfigError(
                f"parallel.ep is {work.ep}, which does not divide model.moe.num_experts = "
                f"{moe.num_experts}; choose a divisor of {moe.num_experts}."
            )
        pieces = num_gpus * work.accumulation
        if work.batch_sequences % pieces:
            raise ConfigError(
                f"train.batch_sequences is {work.batch_sequences}, which does not split over "
                f"{num_gpus} GPUs times train.accumulation = {work.accumulation}; use a multiple "
                f"of {pieces}, or --sequences-per-gpu to let the batch grow with the GPUs."
            )
        tp_here = math.gcd(work.expert_tp, per_node)
        ep_here = math.gcd(work.ep, max(1, per_node // work.expert_tp))
        copies = num_gpus // slices
        return cls(
            world=Group(num_gpus, per_node),
            ep=Group(work.ep, ep_here),
            expert_tp=Group(work.expert_tp, tp_here),
            edp=Group(copies, math.gcd(copies, max(1, per_node // slices))),
            tokens=work.batch_sequences // pieces * work.sequence_length,
        )


def _gpus_of_a_node(cluster: Cluster, num_gpus: int) -> int:
    if not 1 <= num_gpus <= cluster.num_gpus:
        raise ConfigError(
            f"--gpus is {num_gpus}, but {cluster.name} has {cluster.nodes} nodes of "
            f"{cluster.gpus_per_node} GPUs; use 1 to {cluster.num_gpus} or raise nodes in the "
            "cluster's file."
        )
    size = cluster.gpus_per_node
    if num_gpus > size and num_gpus % size:
        raise ConfigError(
            f"--gpus is {num_gpus}, which does not fill nodes of {size} GPUs; use a multiple of "
            f"{size}, or at most {size}."
        )
    return min(num_gpus, size)
