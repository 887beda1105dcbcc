"""What a step waits for dense parameters and their gradients, by how ranks hold them."""

from collections.abc import Sequence

from ..planning.gradient_partition import Stage as SliceStage
from ..planning.gradient_partition import dense_stage, moe_stage, partition
from .compute import Compute
from .experts import Schedule
from .gradients import Sharded, Stage, Waiting, all_reduced
from .layers import MicroBatch
from .links import Links
from .sizes import Sizes

NOTHING = Waiting(0.0, 0.0)


def dense_waiting(
    compute: Compute,
    links: Links,
    batch: MicroBatch,
    head_s: float,
    schedule_L: Sequence[Schedule],
) -> tuple[Waiting, Waiting]:
    """Return what all forwards and all backwards of a step wait for.

    ``head_s`` is the backward of the scores and the loss, which comes before that of the layers.
    """
    work = compute.work
    if compute.fold.world.size == 1:
        return NOTHING, NOTHING
    if work.dense == "fsdp":
        return _sharded(compute, links, batch)
    if work.has_gradient_slices:
        return NOTHING, _sliced(compute, links, batch, head_s, schedule_L)
    sizes = Sizes.of(work.model)
    layers = [
        Stage(stage.seconds, stage.link_s, stage.parameters + _router(compute, sizes, layer))
        for layer, stage in enumerate(batch.backward_stages)
    ]
    last = Stage(head_s, 0.0, sizes.head + sizes.last_norm)
    stages = [last, *reversed(layers), Stage(0.0, 0.0, sizes.embedding)]
    line = links.all_reduce(compute.fold.world)
    return NOTHING, all_reduced(stages, line, work.wide_bytes, compute.cluster.contention)


def _router(compute: Compute, sizes: Sizes, layer: int) -> int:
    return sizes.router if compute.work.model.is_moe(layer) else 0


def _sharded(compute: Compute, links: Links, batch: MicroBatch) -> tuple[Waiting, Waiting]:
    """Return the gathers of FSDP, in each micro-batch, and its sums in the last one."""
    work, world, cluster = compute.work, compute.fold.world, compute.cluster
    sizes, times = Sizes.of(work.model), work.accumulation
    sharded = Sharded(
        links.all_gather(world),
        links.reduce_scatter(world),
        work.item_bytes,
        work.wide_bytes,
        cluster.collectives == "nccl",
        cluster.contention,
    )
    root = sizes.embedding + sizes.head + sizes.last_norm
    forward = [sharded.forward(batch.forward_stages, root)] * times
    stages = list(reversed(batch.backward_stages))
    backward = [sharded.backward(stages, root, sums=False)] * (times - 1)
    backward.append(sharded.backward(stages, root, sums=True))
    return _together(forward), _together(backward)


def _together(waits: Sequence[Waiting]) -> Waiting:
    exposed_s, hidden_s = sum(w.exposed_s for w in waits), sum(w.hidden_s for w in waits)
    return Waiting(exposed_s, hidden_s, waits[0].contention)


def _sliced(
    compute: Compute,
    links: Links,
    batch: MicroBatch,
    head_s: float,
    schedule_L: Sequence[Schedule],
) -> Waiting:
    """Return what is left where planning says when gradients travel (gradient_partition.py)."""
    work, sizes = compute.work, Sizes.of(compute.work.model)
    width, schedules = work.wide_bytes, list(schedule_L)
    stages: list[SliceStage] = [dense_stage(head_s, (sizes.head + sizes.last_norm) * width)]
    for layer in reversed(range(work.model.num_layers)):
        stage, rest_s = batch.backward_stages[layer], 0.0
        if work.model.is_moe(layer):
            schedule = schedules.pop()
            rest_s = schedule.backward.seconds
            there, back = schedule.forward_chunks, schedule.backward_chunks
            stages.append(moe_stage(schedule.model, schedule.work, there, 0, [back]))
        new_bytes = (stage.parameters + _router(compute, sizes, layer)) * width
        stages.append(dense_stage(max(0.0, stage.seconds - rest_s), new_bytes))
    stages.append(dense_stage(0.0, sizes.embedding * width))
    alone_s = sum(stage.best(0.0).seconds for stage in stages)
    planned = partition(stages, links.all_reduce(compute.fold.world))
    return Waiting(max(0.0, planned.seconds - alone_s), 0.0)
