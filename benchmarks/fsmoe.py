"""FSMoE's schedule on a slow network: are the chosen chunks the best, and how much do they gain?

    python benchmarks/fsmoe.py [--between RATE ...] [--repeats 5] [--only N ...]

Two nodes of two ranks (network_bed.py), one MoE layer, forward and backward. For each of 20 layers
the ranks measure their links and experts, try what should be fastest, and choose a path (one level
of ranks or two) and the chunks of both directions. Then both paths with all pairs of 1, 2 and 4
chunks, the chosen ones, and the plain all-to-all without chunks, are timed, interleaved. The rate
between nodes and the sizes vary, so that links or experts take most of the time. Needs root.
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
RATES = {"1gbit": "4gbit", "200mbit": "1gbit"}
"""Between nodes and, for each, inside a node."""
LAYERS = [
    {"tokens": tokens, "width": width, "inner": inner, "experts": 16, "k": 2, "skew": skew}
    for tokens, width, inner, skew in (
        (512, 256, 128, "uniform"),
        (512, 256, 512, "uniform"),
        (512, 256, 1024, "zipf"),
        (1024, 256, 128, "zipf"),
        (1024, 256, 512, "uniform"),
        (1024, 256, 1024, "uniform"),
        (1024, 512, 256, "uniform"),
        (2048, 256, 256, "uniform"),
        (2048, 256, 768, "uniform"),
        (2048, 256, 768, "zipf"),
    )
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--between", nargs="+", default=list(RATES), help="rates between nodes")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", type=int, nargs="+", help="numbers of layers, from 0")
    arguments = parser.parse_args()
    layers = [LAYERS[n] for n in arguments.only] if arguments.only else LAYERS
    rows = []
    try:
        for inter in arguments.between:
            rates = {"inter": inter, "intra": RATES[inter]}
            with Network(nodes=2, ranks_per_node=2, **rates) as network:
                case = [str(HERE / "fsmoe_case.py"), json.dumps(layers), str(arguments.repeats)]
                done = network.run(case, timeout_s=1500)
                found = [line for line in done.outputs[0].splitlines() if line.startswith("{")]
                rows += [summary(json.loads(line) | {"inter": inter}) for line in found]
                least = sum(2 * row["tokens"] * row["width"] * 4 for row in rows[-len(found) :])
                done.traffic.check_sent({"node0": least, "node1": least})
    except MoeyardError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for line in table(rows):
        print(line)
    question = "seconds of an MoE layer in chunks on two nodes of two ranks, and the chosen chunks"
    name = "_".join(["fsmoe", *(arguments.between if len(arguments.between) < len(RATES) else [])])
    print("written to", write_results(name, {"question": question, "rows": rows}).name)
    return 0


def summary(row: dict) -> dict:
    """Add medians and ratios: to the plain path, and to the best pair found by trying all."""
    medians = {name: statistics.median(times) for name, times in row["seconds"].items()}
    pairs = {name: seconds for name, seconds in medians.items() if name != "plain"}
    best = min(pairs, key=lambda name: pairs[name])
    chosen = row["chosen"]
    gains = [p / c for p, c in zip(row["seconds"]["plain"], row["seconds"][chosen], strict=True)]
    return row | {
        "best": best,
        "chosen_over_best": medians[chosen] / medians[best],
        "gain": medians["plain"] / medians[chosen],
        "gain_interval": (min(gains), max(gains)),
        "medians": medians,
    }


def table(rows: list[dict]) -> Iterator[str]:
    """Yield the table in Markdown."""
    yield (
        "| between nodes | tokens | width | inner | load | plain ms | chosen | ms "
        "| predicted | best | chosen/best | plain/chosen (pairs) |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|---|"
    for row in rows:
        ms = {name: 1000 * seconds for name, seconds in row["medians"].items()}
        low, high = row["gain_interval"]
        yield (
            f"| {row['inter']} | {row['tokens']} | {row['width']} | {row['inner']} | {row['skew']} "
            f"| {ms['plain']:.0f} | {row['chosen']} | {ms[row['chosen']]:.0f} "
            f"| {1000 * row['predicted_s']:.0f} | {row['best']} | {row['chosen_over_best']:.2f} "
            f"| {row['gain']:.2f} ({low:.2f}-{high:.2f}) |"
        )


if __name__ == "__main__":
    sys.exit(main())
