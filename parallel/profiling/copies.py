"""What copies of experts cost on the ranks of a run, next to what they save."""

from collections.abc import Sequence
from statistics import median

import torch

from ..experts.hop import Level
from ..experts.materialized import MaterializedExperts
from ..mesh import Mesh
from ..planning.calibrate import CopyCosts, link_rows
from ..planning.cost_model import CostModel, Linear, Sample, fit
from ..planning.placement import Placement, Topology
from .layer import LayerShape, even_work_of, measure_layer
from .measure import Probe, Trial, halvings, measure


def measure_copies(
    copies: MaterializedExperts,
    shape: LayerShape,
    levels: Sequence[Level],
    mesh: Mesh,
    device: torch.device,
    micro_batches: int,
) -> CopyCosts:
    """Return the costs of a layer in a step of ``micro_batches``; every rank must call it.

    ``levels`` are those of the layer's path.
    """
    model = measure_layer(shape, levels, copies.layers[0], mesh, device)
    amounts = halvings(copies.most_copied, 4)
    probes = [  # SparseAllGather and SparseReduceScatter
        Probe("gather", amounts, lambda number: Trial(number, copies.trial(number)[0])),
        Probe("scatter", amounts, lambda number: Trial(number, copies.trial(number)[1])),
    ]
    samples = measure(probes, mesh, device)
    rows = shape.tokens * shape.num_choices
    compute_s = model.experts.seconds(rows) + model.experts_backward.seconds(rows)
    repeats = micro_batches if copies.rematerialize else 1
    return CopyCosts(
        row_s=compute_s / rows,
        link_row_s=_links_s(model, shape, levels, mesh) / _even_rows(shape, copies.topology),
        gather=_line(samples["gather"]),
        reduce=_line(samples["scatter"]),
        contention=model.contention,
        gathers=2 * repeats if copies.rematerialize else 1,
        reduces=repeats,
    )


def _links_s(model: CostModel, shape: LayerShape, levels: Sequence[Level], mesh: Mesh) -> float:
    """Return the seconds in which even loads travel, out and back, in forward and in backward."""
    work = even_work_of(shape, levels, mesh)
    between = model.dispatch.seconds(work.sent_bytes) + model.combine.seconds(work.sent_bytes)
    inside = model.gather.seconds(work.node_bytes) + model.scatter.seconds(work.node_bytes)
    return 2 * (between + inside)


def _even_rows(shape: LayerShape, topology: Topology) -> float:
    """Return the rows of the busiest link for even loads without copies."""
    owners = Placement.contiguous(shape.num_experts, topology.num_ranks)
    rows = shape.tokens * topology.num_ranks * shape.num_choices
    load_E = torch.full((shape.num_experts,), rows / shape.num_experts, dtype=torch.float64)
    return link_rows(owners, load_E, topology)


def _line(samples: Sequence[Sample]) -> Linear:
    """Return the line of samples, through the origin if they have one size only."""
    if len({size for size, _ in samples}) > 1:
        return fit(samples)
    return Linear(0.0, median(seconds / size for size, seconds in samples))
