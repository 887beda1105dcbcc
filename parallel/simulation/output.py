"""What ``moeyard simulate`` prints and writes: a table, and everything as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..planning.placement import Placement
from .cluster import Cluster
from .placed import mean_share
from .sizes import Sizes
from .step import Prediction

BILLION = 1e9
LEGEND = """\
wait: share of the step in which the busiest rank waits for messages; rows and gradients: of what
MFU: operations that the model needs, over the peak of the GPUs
GB: memory of a rank; '!' = more than it has
chunks: path of rows to their experts, and the messages of forward/backward
busiest: rows of the fullest rank over the mean; copies: of experts, on all ranks and layers
"""


def as_table(config: Path, found: Sequence[Prediction], notes: Sequence[str]) -> str:
    """Return a table of predictions for the run of ``config``, its legend and the notes."""
    first = found[0]
    sizes = Sizes.of(first.work.model)
    lines = [
        f"predicted {config} on {first.cluster.name}: nothing was measured",
        f"parameters={sizes.total:,} active={sizes.active(first.work.model):,} "
        f"sequence_length={first.work.sequence_length} precision={first.work.precision} "
        f"ep={first.work.ep} dense={first.work.dense}",
        f"{'GPUs':>5} {'batch':>6} {'step ms':>9} {'wait':>6} {'rows':>6} {'grads':>6} "
        f"{'tokens/s':>9} {'MFU':>6} {'GB':>7} {'chunks':<18} {'busiest':>7} {'copies':>6} "
        f"{'cost/1e9':>9}",
    ]
    lines += [_line(prediction) for prediction in found]
    legend = LEGEND
    if first.cost_of(1) is not None:
        legend += "cost/1e9: of a billion tokens, in the currency of the price\n"
    return "\n".join([*lines, legend, *notes]).rstrip() + "\n"


def _line(found: Prediction) -> str:
    share, _ = mean_share(found.placed)
    cost = found.cost_of(BILLION)
    mark = " " if found.fits else "!"
    rows, gradients = (found.parts_s[name] / found.step_s for name in ("rows", "gradients"))
    return (
        f"{found.fold.world.size:5} {found.work.batch_sequences:6} {1000 * found.step_s:9.4g} "
        f"{rows + gradients:6.1%} {rows:6.1%} {gradients:6.1%} {found.tokens_per_s:9.4g} "
        f"{found.utilisation:6.1%} {found.memory.total / 1e9:6.3g}{mark} {_schedule(found):<18} "
        f"{share:7.2f} {sum(p.num_copies for p in found.placed):6} "
        f"{'-' if cost is None else format(cost, '.4g'):>9}"
    )


def _schedule(found: Prediction) -> str:
    """Return the way of rows that most MoE layers have."""
    if not found.schedules or found.work.ep * found.work.expert_tp == 1:
        return "-"
    ways = [f"{s.path} {s.forward_chunks}/{s.backward_chunks}" for s in found.schedules]
    return max(dict.fromkeys(ways), key=ways.count)


def as_json(cluster: Cluster, found: Sequence[Prediction], notes: Sequence[str]) -> str:
    """Return everything about predictions on ``cluster``."""
    values = {
        "measured": False,
        "cluster": cluster.model_dump(mode="json"),
        "predictions": [_values(prediction) for prediction in found],
        "notes": list(notes),
    }
    return json.dumps(values, indent=1) + "\n"


def _values(found: Prediction) -> dict[str, Any]:
    """Return a prediction for JSON."""
    return {
        "gpus": found.fold.world.size,
        "batch_sequences": found.work.batch_sequences,
        "step_s": found.step_s,
        "exposed_s": found.exposed_s,
        "parts_s": found.parts_s,
        "phases_s": found.phases_s,
        "tokens_per_s": found.tokens_per_s,
        "mfu": found.utilisation,
        "fits": found.fits,
        "memory_bytes": {**asdict(found.memory), "total": found.memory.total},
        "cost_per_billion_tokens": found.cost_of(BILLION),
        "layers": [
            {
                "path": schedule.path,
                "chunks": schedule.forward_chunks,
                "backward_chunks": schedule.backward_chunks,
                "share": placed.share,
                "share_without_copies": placed.owners_share,
                "placement": _holders(placed.placement),
            }
            for schedule, placed in zip(found.schedules, found.placed, strict=True)
        ],
    }


def _holders(placement: Placement) -> dict[str, Any]:
    """Return where experts are: neighbours on a rank in one word, anything else in full."""
    if placement == Placement.contiguous(placement.num_experts, placement.num_ranks):
        return {"kind": "contiguous"}
    kind = "copies" if any(placement.copies_R()) else "owners"
    return {"kind": kind, **placement.as_dict()}
