"""Dense gradients on a slow network: what it gains to send them where the link has room (FSMoE).

    python benchmarks/gradient_partition.py [--inter 200mbit] [--intra 1gbit] [--steps 7]

Two nodes of two ranks (network_bed.py) run a stack of four blocks, each a dense MLP and an MoE
layer, forward and backward. Dense gradients are summed over all ranks at the end of backward; by
DDP, next to the rows of the MoE layers; at once, which is the same with buckets of 1 MB; in slices,
which a plan puts where the link between nodes waits; or by the faster of these two, as
``parallel.gradient_slices: auto`` finds it. Steps are interleaved. Needs root.
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
SETTINGS = {
    "tokens": 512,
    "width": 512,
    "dense": 1024,
    "inner": 768,
    "experts": 16,
    "blocks": 4,
    "k": 2,
    "unmeasured": 1,
}
CHOSEN = "auto"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inter", default="200mbit", help="rate of a node's link")
    parser.add_argument("--intra", default="1gbit", help="rate of a rank's link")
    parser.add_argument("--steps", type=int, default=7, help="of each arm")
    parser.add_argument("--chunks", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    settings = SETTINGS | {"steps": arguments.steps, "chunks": arguments.chunks}
    rates = {"inter": arguments.inter, "intra": arguments.intra}
    try:
        with Network(nodes=2, ranks_per_node=2, **rates) as network:
            case = [str(HERE / "gradient_partition_case.py"), json.dumps(settings)]
            done = network.run(case, timeout_s=1500)
    except MoeyardError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    found = [json.loads(line) for line in done.outputs[0].splitlines() if line.startswith("{")]
    rows = [summary(row, arm) for row in found for arm in row["seconds"]]
    for line in table(rows):
        print(line)
    for row in found:
        sent = {name: row["slices"][name] / 2**20 for name in ("moe", "dense", "end")}
        shares = ", ".join(f"{name} {size:.1f}" for name, size in sent.items())
        print(f"{row['chunks']} chunks: auto is {row['auto']}; MiB by place in the plan: {shares}")
    question = "seconds of a step by the time at which dense gradients are summed"
    figures = {"question": question, **rates, "settings": settings, "rows": rows, "runs": found}
    print("written to", write_results("gradient_partition", figures).name)
    return 0


def summary(row: dict, arm: str) -> dict:
    """Return an arm's median, and how much longer it takes than ``auto`` in the same turn."""
    seconds, chosen = row["seconds"][arm], row["seconds"][CHOSEN]
    gains = sorted(other / own for other, own in zip(seconds, chosen, strict=True))
    quarter = len(gains) // 4
    return {
        "chunks": row["chunks"],
        "arm": arm,
        "seconds": statistics.median(seconds),
        "over_auto": statistics.median(gains),
        "over_auto_interval": (gains[quarter], gains[-1 - quarter]),
    }


def table(rows: list[dict]) -> Iterator[str]:
    """Yield the table in Markdown."""
    yield "| chunks | gradients are summed | ms a step | over auto (quartiles) |"
    yield "|---|---|---|---|"
    for row in rows:
        low, high = row["over_auto_interval"]
        yield (
            f"| {row['chunks']} | {row['arm']} | {1000 * row['seconds']:.0f} "
            f"| {row['over_auto']:.2f} ({low:.2f}-{high:.2f}) |"
        )


if __name__ == "__main__":
    sys.exit(main())
