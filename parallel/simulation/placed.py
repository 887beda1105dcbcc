"""Where the experts of an MoE layer live on paper, and which get copies if the run makes any.

E experts, P expert-parallel ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from ..planning.calibrate import CopyCosts, calibrate, link_rows
from ..planning.dispatch import shares_RE
from ..planning.materialize import CopyBudget
from ..planning.placement import Placement, Topology
from ..planning.reshard import reshard
from .choices import Array, Choices
from .compute import Compute
from .experts import WEIGHT_AND_ID, Travel
from .links import Links
from .sizes import Sizes
from .workload import Fold, Workload


@dataclass(frozen=True, slots=True, eq=False)
class Placed:
    """A layer's experts on ranks."""

    placement: Placement
    travel: Travel
    waiting_s: float
    """What a step waits for the weights and gradients of copies."""
    share: float
    """The busiest rank's rows over the mean."""
    owners_share: float
    """The same without copies."""

    @property
    def num_copies(self) -> int:
        """Copies on all ranks."""
        return sum(self.placement.copies_R())


def place(
    compute: Compute, links: Links, choices: Choices, owners: Placement | None = None
) -> Placed:
    """Place a layer: ``owners`` or neighbouring experts on a rank, and copies where they pay."""
    fold, work = compute.fold, compute.work
    num_experts = len(choices.odds_E)
    owners = owners or Placement.contiguous(num_experts, work.ep)
    topology = Topology(work.ep, fold.ep.per_node)
    load_E = torch.from_numpy(choices.visits_E() * fold.tokens * work.ep * work.accumulation)
    placement, waiting_s, scale = owners, 0.0, 1.0
    budget = copy_budget(compute)
    if budget is not None and work.ep > 1:
        costs = copy_costs(compute, links, float(load_E.max()))
        placement = calibrate(owners, load_E, topology, budget, costs)
        waiting_s = _waiting(placement, costs, load_E, topology)
        before = link_rows(owners, load_E, topology)
        scale = link_rows(placement, load_E, topology) / before if before else 1.0
    ranks = (fold.tokens, fold.ep.per_node, min(links.ranks_per_card, fold.ep.per_node))
    owned = Travel.of(choices, _shares(owners, topology), *ranks)
    travel = owned
    if placement is not owners:
        # Rows of copied experts stay nearer: links carry fewer by the same share as rows.
        copied = Travel.of(choices, _shares(placement, topology), *ranks)
        fewer = (owned.copies * scale, owned.node_copies * scale, owned.card_copies * scale)
        travel = Travel(copied.rows, *fewer)
    mean = fold.tokens * choices.k
    return Placed(placement, travel, waiting_s, travel.rows / mean, owned.rows / mean)


def _shares(placement: Placement, topology: Topology) -> Array:
    found: Array = shares_RE(placement, topology).numpy()
    return found


def better_owners(work: Workload, fold: Fold, choices_L: Sequence[Choices]) -> list[Placement]:
    """Return the owners that Hecate's Algorithm 2 gives to the experts of all layers."""
    num_experts = len(choices_L[0].odds_E)
    load_LE = torch.from_numpy(np.stack([choices.visits_E() for choices in choices_L]))
    current = [Placement.contiguous(num_experts, work.ep)] * len(choices_L)
    topology = Topology(work.ep, fold.ep.per_node)
    return reshard(current, load_LE, topology, CopyBudget(num_experts, 0))


def copy_budget(compute: Compute) -> CopyBudget | None:
    """Return what may be copied, as a run works it out (parallel/experts/open_copies.py)."""
    work = compute.work
    if work.copy_bytes is None:
        return None
    sizes = Sizes.of(work.model)
    layers = min(2, sizes.num_moe_layers) if work.rematerializes else sizes.num_moe_layers
    slot_bytes = sizes.expert * (work.item_bytes + work.wide_bytes)
    per_rank = min(work.copy_bytes // (slot_bytes * layers), sizes.num_experts)
    return CopyBudget(work.copy_experts or sizes.num_experts, int(per_rank))


def copy_costs(compute: Compute, links: Links, rows: float) -> CopyCosts:
    """Return what copies cost and save, from the cluster's description."""
    work, fold = compute.work, compute.fold
    sizes = Sizes.of(work.model)
    forward, backward = compute.expert_lines(rows)
    assert work.model.moe is not None
    row_bytes = work.model.d_model * work.item_bytes + WEIGHT_AND_ID * work.model.moe.router.k
    far_s = links.far_s(fold.ep) if fold.ep.nodes > 1 else links.inside_all_to_all_s
    gather = links.all_gather(fold.ep)
    return CopyCosts(
        row_s=forward.beta + backward.beta,
        link_row_s=4 * row_bytes * far_s,
        gather=replace(gather, beta=gather.beta * sizes.expert * work.item_bytes),
        reduce=replace(gather, beta=gather.beta * sizes.expert * work.wide_bytes),
        contention=compute.cluster.contention,
        gathers=2 * work.accumulation if work.rematerializes else 1,
        reduces=work.accumulation if work.rematerializes else 1,
    )


def _waiting(
    placement: Placement, costs: CopyCosts, load_E: torch.Tensor, topology: Topology
) -> float:
    """Return the seconds of copies that do not fit beside the experts' computation."""
    whole = costs.seconds(placement, load_E, topology)
    shares = shares_RE(placement, topology)
    compute_s = costs.row_s * float((shares @ load_E.double()).max())
    link_s = costs.link_row_s * link_rows(placement, load_E, topology)
    return max(0.0, whole - compute_s - link_s)


def mean_share(placed: list[Placed]) -> tuple[float, float]:
    """Return the mean over layers of the busiest rank's share, with copies and without."""
    with_copies = float(np.mean([p.share for p in placed])) if placed else 1.0
    without = float(np.mean([p.owners_share for p in placed])) if placed else 1.0
    return with_copies, without
