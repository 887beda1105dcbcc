"""Copies of busy experts on a slow network: what they gain for each kind of skewed load (Hecate).

    python benchmarks/fssdp.py [--inter 1gbit] [--intra 4gbit]

Two nodes of two ranks (network_bed.py) run a stack of four MoE layers, each after a dense layer,
forward and backward, with experts over all ranks: without copies, with copies kept for the step,
and with copies that travel again in backward (12 % of the memory of weights, gradients and
moments). Steps are interleaved. The compute bound is what even loads would gain if only experts
took time: the fullest rank's rows over the mean. Needs root.
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
    "tokens": 1024,
    "width": WIDTH,
    "inner": INNER,
    "experts": EXPERTS,
    "layers": LAYERS,
    "k": 2,
    "kinds": ["uniform", "zipf", "one_hot", "rotating", "burst"],
    "first": 6,
    "unmeasured": 3,
    "last": 21,
    "copied_experts": 2,
    "copy_bytes": LAYERS * 2 * 2 * EXPERT_BYTES,
    "remat_bytes": max(int(0.12 * OWN_BYTES), 2 * 2 * EXPERT_BYTES),
}
"""Without rematerialization, two copies of each layer fit. A copy has weights and gradients."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inter", default="1gbit", help="rate of a node's link")
    parser.add_argument("--intra", default="4gbit", help="rate of a rank's link")
    arguments = parser.parse_args()
    rates = {"inter": arguments.inter, "intra": arguments.intra}
    try:
        with Network(nodes=2, ranks_per_node=2, **rates) as network:
            done = network.run([str(HERE / "fssdp_case.py"), json.dumps(SETTINGS)], timeout_s=1500)
    except MoeyardError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    found = [json.loads(line) for line in done.outputs[0].splitlines() if line.startswith("{")]
    rows = [summary(row, arm) for row in found for arm in ("copies", "rematerialized")]
    for line in table(rows):
        print(line)
    question = "seconds of a step with and without copies of busy experts, by the kind of load"
    figures = {"question": question, **rates, "settings": SETTINGS, "rows": rows}
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
        "bound": statistics.median(row["max_over_mean"]["plain"]),
        "left": statistics.median(row["max_over_mean"][arm]),
        "copy_memory": row["copy_memory"][arm],
        "all_seconds": {"plain": plain, arm: copies},
    }


def table(rows: list[dict]) -> Iterator[str]:
    """Yield the table in Markdown."""
    yield (
        "| load | copies | plain ms | ms | gain (quartiles) | compute bound | fullest rank then "
        "| memory |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for row in rows:
        low, high = row["gain_interval"]
        yield (
            f"| {row['kind']} | {row['arm']} | {1000 * row['plain_s']:.0f} "
            f"| {1000 * row['seconds']:.0f} | {row['gain']:.2f} ({low:.2f}-{high:.2f}) "
            f"| {row['bound']:.2f} | {row['left']:.2f} | {row['copy_memory']:.0%} |"
        )


if __name__ == "__main__":
    sys.exit(main())
