"""A training step on paper: every layer's time, what overlaps, and what a rank holds.

All ranks are alike but for their experts: the busiest rank of a layer decides, and the others wait
for it. So a step of 4096 GPUs takes as long to simulate as one of 8.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ..planning.placement import Placement
from . import flops
from .choices import Choices
from .cluster import Cluster
from .compute import Compute
from .dense import dense_waiting
from .experts import Schedule
from .gradients import Waiting
from .layers import MicroBatch, add_layers, place_layers
from .links import Links
from .memory import Memory, memory_of
from .placed import Placed
from .sizes import Sizes
from .workload import Fold, Workload

COUNT_BYTES = 8
"""Of the count of an expert's rows, which all ranks sum for the balance losses."""


@dataclass(frozen=True, slots=True, eq=False)
class Prediction:
    """A step of a run on some GPUs, predicted. Nothing here was measured."""

    work: Workload
    cluster: Cluster
    fold: Fold
    parts_s: dict[str, float]
    """The step's seconds by what the busiest rank does; they add up to the step."""
    phases_s: dict[str, float]
    """The same seconds by the phases of ``metrics.jsonl``; ``rest`` are those not named here."""
    memory: Memory
    schedules: list[Schedule]
    """Of each MoE layer."""
    placed: list[Placed]
    """Of each MoE layer."""

    @property
    def step_s(self) -> float:
        """Seconds of a step."""
        return sum(self.parts_s.values())

    @property
    def exposed_s(self) -> float:
        """Seconds in which the busiest rank waits for messages."""
        return self.parts_s["rows"] + self.parts_s["gradients"]

    @property
    def tokens_per_s(self) -> float:
        """Of all ranks."""
        return self.work.batch_sequences * self.work.sequence_length / self.step_s

    @property
    def utilisation(self) -> float:
        """Operations that the model needs over those of the GPUs' peak (MFU)."""
        work, size = self.work, self.fold.world.size
        tokens = work.batch_sequences * work.sequence_length
        needed = flops.model_flops(work.model, tokens, work.sequence_length)
        return needed / (size * self.cluster.gpu.flops[work.precision] * self.step_s)

    @property
    def fits(self) -> bool:
        """Whether a rank's memory holds what the step needs."""
        return self.memory.total <= self.cluster.gpu.memory

    def cost_of(self, tokens: float) -> float | None:
        """Return the price of training on ``tokens``; None without a price of a GPU hour."""
        price = self.cluster.price_per_gpu_hour
        if price is None:
            return None
        return price * self.fold.world.size * tokens / self.tokens_per_s / 3600


def simulate(
    work: Workload,
    cluster: Cluster,
    num_gpus: int,
    choices_L: Sequence[Choices] = (),
    owners_L: Sequence[Placement] = (),
) -> Prediction:
    """Return the prediction for ``num_gpus``.

    ``choices_L`` are how tokens choose, one for each MoE layer; empty = evenly. ``owners_L`` are
    the owners of experts that a plan gives; empty = neighbouring experts share a rank.

    Raises :class:`ConfigError` for GPUs that do not fold, and for a precision without a peak.
    """
    fold = Fold.of(work, cluster, num_gpus)
    compute, links = Compute(work, cluster, fold), Links.of(cluster, fold.world.per_node)
    placed_L, schedule_L = place_layers(compute, links, choices_L, owners_L)
    batch = add_layers(compute, schedule_L)
    waiting = dense_waiting(compute, links, batch, compute.head_s()[1], schedule_L)
    parts, phases = _add_up(compute, links, batch, waiting, sum(p.waiting_s for p in placed_L))
    most = max((p.travel.rows for p in placed_L), default=0.0)
    copies = max((s.copies for s in schedule_L), default=0.0)
    on_cpu = cluster.collectives == "gloo"
    memory = memory_of(work, fold, most, copies, cluster.gpu.reserved, on_cpu=on_cpu)
    return Prediction(work, cluster, fold, parts, phases, memory, schedule_L, placed_L)


def _add_up(
    compute: Compute,
    links: Links,
    batch: MicroBatch,
    waiting: tuple[Waiting, Waiting],
    copies_s: float,
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the parts and the phases of a step: micro-batches, gradients, update."""
    work, fold = compute.work, compute.fold
    sizes, times = Sizes.of(work.model), work.accumulation
    is_sharded = work.dense == "fsdp" and fold.world.size > 1
    dense_here = sizes.dense / (fold.world.size if is_sharded else 1) + sizes.routers
    experts_here = sizes.experts / (work.ep * work.expert_tp)
    owned = experts_here / (fold.edp.size if work.shards_experts else 1)
    clip_s, update_s = compute.update_s(dense_here, owned)
    added_s = times * compute.accumulate_s(dense_here)
    world = links.all_reduce(fold.world)
    counts_s = times * world.seconds(sizes.num_moe_layers * sizes.num_experts * COUNT_BYTES)
    # Gradients of experts, then the sum of losses and the norm. FSDP leaves routers to the end.
    reduce_s, sent_s = _expert_gradients(work, fold, links, experts_here)
    reduce_s += 2 * world.alpha
    if is_sharded:
        reduce_s += world.seconds(sizes.routers * work.wide_bytes)
    head_s, head_back_s = (times * seconds for seconds in compute.head_s())
    forward_wait_s, backward_wait_s = (wait.seconds for wait in waiting)
    latency_s = compute.cluster.gpu.step_latency
    parts = {name: times * seconds for name, seconds in batch.parts_s.items()}
    parts["rows"] += counts_s + copies_s
    parts |= {
        "head": head_s + head_back_s,
        "gradients": forward_wait_s + backward_wait_s + reduce_s + sent_s,
        "update": clip_s + update_s + added_s,
        "latency": latency_s,
    }
    phases = {
        "forward": times * batch.forward_s + head_s + counts_s + forward_wait_s,
        "backward": times * batch.backward_s + head_back_s + added_s + backward_wait_s + copies_s,
        "reduce": reduce_s + clip_s,
        "optimizer": update_s + sent_s,
        "rest": latency_s,
    }
    return parts, phases


def _expert_gradients(
    work: Workload, fold: Fold, links: Links, experts_here: float
) -> tuple[float, float]:
    """Return the seconds of summing gradients of experts, and of sending weights from owners."""
    num_bytes = experts_here * work.wide_bytes
    if not work.shards_experts:
        return links.all_reduce(fold.edp).seconds(num_bytes), 0.0
    # Each gradient goes to its owner alone, and each new weight comes back once.
    sent_s = links.all_gather(fold.edp).seconds(experts_here * work.item_bytes)
    return 0.5 * links.all_reduce(fold.edp).seconds(num_bytes), sent_s
