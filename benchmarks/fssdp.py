"""Copies of busy experts on a slow network: what they gain for each kind of skewed load (Hecate).

    python benchmarks/fssdp.py [--inter 1gbit] [--intra 4gbit] [--kinds one_hot ...]

Two nodes of two ranks (network_bed.py) run a stack of four MoE layers, each after a dense layer,
forward and backward, with experts over all ranks: without copies, with copies kept for the step,
and with copies that travel again in backward (at most 12 % of the memory of weights, gradients and
moments). An expert is copied where a step should get faster, by the times of links and experts that
are measured at the start. Steps are interleaved. The compute bound is what even loads would gain if
only experts took time: the fullest rank's rows over the mean. The link bound is the same for links
between nodes: the rows of the busiest one over those of even loads. Needs root.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

from moeyard.errors import MoeyardError

from network_bed import Network
from report import write_results

HERE = Path(__file__).parent
WIDTH, INNER, EXPERTS, LAYERS = 256, 512, 16, 4
EXPERT_BYTES = 3 * WIDTH * INNER * 4
OWN_BYTES = 4 * EXPERT_BYTES * EXPERTS // 4 * LAYERS
"""Weights, gradients and two moments of a rank's experts."""
SETTINGS = {
    "tokens": 4096,
    "width": WIDTH,
    "inner": INNER,
    "experts": EXPERTS,
    "layers": LAYERS,
    "k": 2,
    "kinds": ["uniform", "zipf", "one_hot", "rotating", "burst"],
    "first": 8,
    "unmeasured": 3,
    "last": 20,
    "copied_experts": 4,
    "copy_bytes": LAYERS * 4 * 2 * EXPERT_BYTES,
    "remat_bytes": max(int(0.12 * OWN_BYTES), 2 * 2 * EXPERT_BYTES),
}
"""Without rematerialization, four copies of each layer fit. A copy has weights and gradients."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inter", default="1gbit", help="rate of a node's link")
    parser.add_argument("--intra", default="4gbit", help="rate of a rank's link")
    parser.add_argument("--kinds", nargs="+", default=SETTINGS["kinds"], help="of load")
    arguments = parser.parse_args()
    settings = SETTINGS | {"kinds": arguments.kinds}
    rates = {"inter": arguments.inter, "intra": arguments.intra}
    try:
        with Network(nodes=2, ranks_per_node=2, **rates) as network:
            done = network.run([str(HERE / "fssdp_case.py"), json.dumps(settings)], timeout_s=1800)
    except MoeyardError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    costs, *found = (
        json.loads(line) for line in done.outputs[0].splitlines() if line.startswith("{")
    )
    rows = [summary(row, arm) for row in found for arm in ("copies", "rematerialized")]
    for line in table(rows):
        print(line)
    question = "seconds of a step with and without copies of busy experts, by the kind of load"
    figures = {"question": question, **rates, "settings": settings, **costs, "rows": rows}
    print("written to", write_results("fssdp", figures).name)
    return 0


def summary(row: dict, arm: str) -> dict:
    """Return the gain of an arm over the plain path, and what an even load would gain."""
    plain, copies = row["seconds"]["plain"], row["seconds"][arm]
    gains = sorted(p / c for p, c in zip(plain, copies, strict=True))
    quarter = len(gains) // 4
    return {
        "kind": row["kind"],
        "arm": arm,
        "plain_s": statistics.median(plain),
        "seconds": statistics.median(copies),
        "gain": statistics.median(gains),
        "gain_interval": (gains[quarter], gains[-1 - quarter]),
        "compute_bound": _median(row, "plain", "computed"),
        "link_bound": _median(row, "plain", "linked"),
        "left": _median(row, arm, "computed"),
        "link_left": _median(row, arm, "linked"),
        "copies": _median(row, arm, "copies"),
        "copy_memory": row["copy_memory"][arm],
        "all_seconds": {"plain": plain, arm: copies},
    }


def _median(row: dict, arm: str, name: str) -> float:
    return statistics.median(step[name] for step in row["shares"][arm])


def table(rows: list[dict]) -> Iterator[str]:
    """Yield the table in Markdown."""
    yield (
        "| load | arm | plain ms | ms | gain (quartiles) | compute bound | link bound "
        "| fullest rank then | link then | copied | memory |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for row in rows:
        low, high = row["gain_interval"]
        yield (
            f"| {row['kind']} | {row['arm']} | {1000 * row['plain_s']:.0f} "
            f"| {1000 * row['seconds']:.0f} | {row['gain']:.2f} ({low:.2f}-{high:.2f}) "
            f"| {row['compute_bound']:.2f} | {row['link_bound']:.2f} | {row['left']:.2f} "
            f"| {row['link_left']:.2f} | {row['copies']:.0f} | {row['copy_memory']:.0%} |"
        )


if __name__ == "__main__":
    sys.exit(main())
