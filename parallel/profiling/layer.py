"""Measure everything that the schedule of an MoE layer needs, on the ranks of a run."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch import nn

from ...moe.experts.base import LayerExperts
from ..experts.hop import Level
from ..mesh import Mesh
from ..planning.cost_model import CostModel, Operation
from ..planning.even_work import even_work
from ..planning.pipeline import LayerWork
from .contention import measure_contention
from .experts import expert_probes
from .links import all_reduce_probe, hop_probes
from .measure import Probe, Trial, halvings, measure, slowest

GRADIENT_BYTES = 16 << 20
"""The largest all-reduce that is measured."""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """An MoE layer, and the rows that a rank brings to it."""

    tokens: int
    """Of a rank's micro-batch."""
    num_experts: int
    num_choices: int
    d_model: int
    dtype: torch.dtype


def even_work_of(
    shape: LayerShape, levels: Sequence[Level], mesh: Mesh, beside_s: float = 0.0
) -> LayerWork:
    """Return the work of a rank in a layer whose tokens choose their experts evenly."""
    return even_work(
        shape.tokens,
        shape.num_experts,
        shape.num_choices,
        shape.d_model * shape.dtype.itemsize,
        ranks=mesh.ep_size,
        ranks_per_node=levels[1].size if len(levels) > 1 else 1,
        to_all=levels[0].to_all,
        beside_s=beside_s,
    )


def measure_layer(
    shape: LayerShape,
    levels: Sequence[Level],
    experts: LayerExperts,
    mesh: Mesh,
    device: torch.device,
    limit_s: float = 10.0,
) -> CostModel:
    """Return the cost model of a layer's path, experts and gradients; every rank must call it.

    ``levels`` are those of the path: one, or between nodes and then inside a node. Sizes reach from
    a sixteenth of the layer's work to all of it. It takes about ``limit_s`` at most.
    """
    rows = halvings(shape.tokens)
    names: list[tuple[Operation, Operation]] = [("dispatch", "combine"), ("gather", "scatter")]
    probes: list[Probe] = []
    for (there, back), level in zip(names, levels, strict=False):
        probes += hop_probes(
            there,
            back,
            level,
            rows,
            num_experts=shape.num_experts,
            num_choices=shape.num_choices,
            d_model=shape.d_model,
            dtype=shape.dtype,
            device=device,
        )
    here = mesh.local_experts(shape.num_experts)
    routed = halvings(shape.tokens * shape.num_choices)
    computing = expert_probes(experts, here, shape.d_model, shape.dtype, device, routed)
    sending, probes = probes[0], probes + computing
    if mesh.dp_group is not None:
        probes.append(
            all_reduce_probe("gradients", mesh.dp_group, halvings(GRADIENT_BYTES), device)
        )
    model = CostModel.fitted(measure(probes, mesh, device, limit_s))
    link, compute = sending.prepare(rows[-1]), computing[0].prepare(routed[-1])
    link_s = model.dispatch.seconds(*slowest([link.size], mesh))
    compute_s = model.experts.seconds(compute.size)
    contention = measure_contention(link.run, link_s, compute.run, compute_s, mesh, device)
    return replace(model, contention=contention)


def measure_beside(
    shape: LayerShape, shared: nn.Module | None, mesh: Mesh, device: torch.device
) -> float:
    """Return the seconds of a shared expert's forward, 0 without one; every rank must call it."""
    if shared is None:
        return 0.0
    x_TD = torch.zeros(shape.tokens, shape.d_model, dtype=shape.dtype, device=device)
    probe = Probe("experts", [shape.tokens], lambda tokens: Trial(tokens, lambda: shared(x_TD)))
    return median(seconds for _, seconds in measure([probe], mesh, device)["experts"])
