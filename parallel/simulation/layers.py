"""All layers of a micro-batch: their seconds, and when links are free meanwhile."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..planning.placement import Placement
from .choices import Choices
from .compute import Compute
from .experts import Layer, Schedule
from .gradients import Stage
from .links import Links
from .placed import Placed, place
from .sizes import Sizes

PARTS = ("attention", "experts", "other", "recompute", "rows")
"""What a layer does: ``rows`` is waiting for them, ``other`` norms, routers and dense MLPs."""


@dataclass(slots=True, eq=False)
class MicroBatch:
    """Seconds of a micro-batch's layers, forward and backward."""

    forward_s: float = 0.0
    backward_s: float = 0.0
    parts_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    forward_stages: list[Stage] = field(default_factory=list)
    """A stage for each layer, in the order of layers."""
    backward_stages: list[Stage] = field(default_factory=list)
    """The same of backward, in the order of layers too."""

    def add(self, part: str, forward_s: float, backward_s: float) -> None:
        """Add seconds of a layer."""
        self.forward_s += forward_s
        self.backward_s += backward_s
        self.parts_s[part] += forward_s + backward_s


def place_layers(
    compute: Compute, links: Links, choices_L: Sequence[Choices], owners_L: Sequence[Placement]
) -> tuple[list[Placed], list[Schedule]]:
    """Place the experts of each MoE layer and choose its schedule; equal layers only once.

    Without ``choices_L`` tokens choose evenly; without ``owners_L`` neighbours share a rank.
    """
    moe = compute.work.model.moe
    if moe is None:
        return [], []
    if not choices_L:
        choices_L = [Choices.even(moe.num_experts, moe.router.k)] * len(
            compute.work.model.moe_layers
        )
    shared_s = compute.mlp_s(moe.d_shared) if moe.d_shared else 0.0
    known: dict[tuple[int, int], tuple[Placed, Schedule]] = {}
    found = []
    for number, choices in enumerate(choices_L):
        owners = owners_L[number] if owners_L else None
        key = (id(choices), id(owners))
        if key not in known:
            placed = place(compute, links, choices, owners)
            layer = Layer(compute, links, placed.travel, shared_s, _capacity(compute))
            known[key] = placed, layer.schedule()
        found.append(known[key])
    return [placed for placed, _ in found], [schedule for _, schedule in found]


def _capacity(compute: Compute) -> float | None:
    """Return the rows that a rank sends with the padded path, if it is the run's."""
    work, moe = compute.work, compute.work.model.moe
    if work.path != "padded" or moe is None:
        return None
    most = moe.router.most_rows(work.sequence_length, moe.num_experts)
    assert most is not None, "the configuration was not validated"
    return float(moe.num_experts * most * (compute.fold.tokens // work.sequence_length))


def add_layers(compute: Compute, schedule_L: Sequence[Schedule]) -> MicroBatch:
    """Return all layers of a micro-batch."""
    model, batch = compute.work.model, MicroBatch()
    parameters, schedules = Sizes.of(model).layers, iter(schedule_L)
    latency_s = compute.cluster.gpu.layer_latency
    for layer in range(model.num_layers):
        before = (batch.forward_s, batch.backward_s)
        link_s = exposed_s = (0.0, 0.0)
        batch.add("attention", *compute.attention_s(layer))
        batch.add("other", compute.block_s() + latency_s, 2 * compute.block_s() + latency_s)
        if model.is_moe(layer):
            schedule = next(schedules)
            _add_experts(batch, compute, schedule)
            link_s, exposed_s = schedule.link_s, schedule.exposed_s
        else:
            mlp_s = compute.mlp_s(model.d_ff or 0)
            batch.add("other", mlp_s, 2 * mlp_s)
        forward_s = batch.forward_s - before[0]
        if compute.work.recompute is True:
            # The whole layer again, and its messages too.
            batch.add("recompute", 0.0, forward_s - exposed_s[0])
            batch.add("rows", 0.0, exposed_s[0])
            link_s = (link_s[0], link_s[0] + link_s[1])
        count = parameters[layer]
        batch.forward_stages.append(Stage(forward_s, link_s[0], count))
        batch.backward_stages.append(Stage(batch.backward_s - before[1], link_s[1], count))
    return batch


def _add_experts(batch: MicroBatch, compute: Compute, schedule: Schedule) -> None:
    """Add router, experts and the rows that travel to them."""
    moe = compute.work.model.moe
    assert moe is not None, "a layer without experts"
    router_s = compute.router_s()
    batch.add("other", router_s, 2 * router_s)
    batch.add("other", schedule.packing_s, schedule.packing_s)
    if moe.d_shared and not schedule.work.beside_s:
        shared_s = compute.mlp_s(moe.d_shared)
        batch.add("other", shared_s, 2 * shared_s)
    batch.add("experts", schedule.forward.busy_s("compute"), schedule.backward.busy_s("compute"))
    batch.add("rows", *schedule.exposed_s)
