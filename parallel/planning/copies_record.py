"""What copies of experts did for a step's load, in a few numbers.

L MoE layers, E experts.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .dispatch import largest_share
from .placement import Placement, Topology


def record_of(
    placements: Sequence[Placement], counts_LE: Tensor, topology: Topology
) -> dict[str, Any]:
    """Return what a record of ``metrics.jsonl`` holds about copies, for observers.

    ``number`` of copies on all ranks and in all layers; ``moved``, experts that a plan or their
    load gave to another owner than the first one; and the largest rank's share of the step's rows
    over the mean, if sources send equally many, mean over layers weighted by rows: ``share``, and
    ``share_without`` copies. 1 is perfect balance.
    """
    rows_L = counts_LE.sum(dim=1).tolist()
    total = max(1, sum(rows_L))

    def mean_share(chosen: Sequence[Placement]) -> float:
        shares = zip(rows_L, chosen, counts_LE, strict=True)
        return sum(rows * largest_share(p, load_E, topology) for rows, p, load_E in shares) / total

    first = Placement.contiguous(counts_LE.shape[1], topology.num_ranks)
    pairs = [pair for p in placements for pair in zip(p.owner_E, first.owner_E, strict=True)]
    return {
        "number": sum(sum(placement.copies_R()) for placement in placements),
        "moved": sum(owner != before for owner, before in pairs),
        "share_without": mean_share([placement.owners_only for placement in placements]),
        "share": mean_share(placements),
    }
