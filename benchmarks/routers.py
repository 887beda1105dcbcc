"""Every causal router on the same text: loss, load, idle experts, time of a step.

    python benchmarks/routers.py --text tinyshakespeare.txt [--work DIR] [--only NAME ...]

Models of configs/train/shakespeare.yaml with 16 experts and the same active parameters: 2 experts
of width 256 for a token, or 1 of width 512. Each sees 150 steps of 2048 tokens, first bytes of
Shakespeare with three seeds, then Python's standard library with one. A seed has the same batches
and the same weights outside routers in every arm. About two minutes a run on one thread; runs that
are done are read, so interrupt and start again as you like.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

from router_arms import ARMS
from router_plot import plot

from report import write_results
from runs import read_metrics, train

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs" / "train" / "shakespeare.yaml"
STEPS, TOKENS, LAYERS = 150, 2048, 4
CELLS = (("shakespeare", 0), ("shakespeare", 1), ("shakespeare", 2), ("stdlib", 0))
"""Text and seed, in the order in which they run."""
COMMON = (
    "optimizer.warmup_steps=20",
    "optimizer.lr=3e-3",
    "train.log_every=10",
    "train.eval_every=0",
    "train.eval_sequences=256",
    "checkpoint.every=75",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True, help="tinyshakespeare.txt")
    parser.add_argument("--work", type=Path, default=Path("runs/routers"), help="the runs' folders")
    parser.add_argument("--only", nargs="+", choices=list(ARMS), default=list(ARMS))
    arguments = parser.parse_args()
    sources = {"shakespeare": str(arguments.text.resolve()), "stdlib": "stdlib"}
    grid = [(text, seed, arm) for text, seed in CELLS for arm in arguments.only]
    records, started, trained = {}, time.monotonic(), 0
    for number, (text, seed, arm) in enumerate(grid, 1):
        run_dir = arguments.work / f"{text}-{seed}-{arm}"
        is_done = any(record["step"] == STEPS for record in read_metrics(run_dir))
        overrides = [*COMMON, f"seed={seed}", f"data.source={sources[text]}", *ARMS[arm]]
        found = train(CONFIG, run_dir, overrides, STEPS, threads=1)
        records[text, seed, arm] = found
        trained += not is_done
        each = (time.monotonic() - started) / max(1, trained)
        loss = found[-1]["eval_loss_per_byte"]
        left = each * (len(grid) - number) / 60
        print(
            f"{number}/{len(grid)} {run_dir.name} loss={loss:.4f} left_min<{left:.0f}", flush=True
        )
    rows = sorted((row_of(arm, records) for arm in arguments.only), key=lambda row: row["mean"])
    for line in table(rows):
        print(line)
    question = "validation loss, load and time of every router at equal active parameters"
    figures = {"question": question, "steps": STEPS, "arms": ARMS, "rows": rows}
    print(f"written to {write_results('routers', figures)}")
    (ROOT / "docs" / "images" / "routers.svg").write_text(plot(rows))


def row_of(arm: str, records: dict) -> dict:
    """Summarise the runs of one router."""
    runs = {cell: records[(*cell, arm)] for cell in CELLS}
    losses = [runs[cell][-1]["eval_loss_per_byte"] for cell in CELLS]
    late = [record for found in runs.values() for record in found[-5:]]
    layers = [counts for record in late for counts in record["expert_tokens"]]
    return {
        "router": arm,
        "losses": losses[:-1],
        "mean": statistics.mean(losses[:-1]),
        "stdev": statistics.stdev(losses[:-1]),
        "stdlib": losses[-1],
        "max_over_mean": statistics.mean(max(c) * len(c) / max(1, sum(c)) for c in layers),
        "idle": statistics.mean(sum(rows == 0 for rows in c) for c in layers),
        "experts_of_a_token": sum(map(sum, layers)) / (len(layers) * TOKENS),
        "step_ms": 1000 * min(step_s_at_the_end(found) for found in runs.values()),
    }


def step_s_at_the_end(records: list[dict]) -> float:
    """Return the seconds of a step at the end: some routers begin dense.

    The fastest of four runs counts, because other work may have taken the cores from some.
    """
    return statistics.mean(record["step_s"] for record in records[-5:])


def table(rows: list[dict]) -> Iterator[str]:
    """Yield the table in Markdown, best first."""
    yield "| router | loss, 3 seeds | stdlib | max/mean | idle | experts a token | ms a step |"
    yield "|---|---|---|---|---|---|---|"
    for row in rows:
        yield (
            f"| `{row['router']}` | {row['mean']:.4f} ± {row['stdev']:.4f} | {row['stdlib']:.4f} "
            f"| {row['max_over_mean']:.2f} | {row['idle']:.1f} "
            f"| {row['experts_of_a_token']:.2f} | {row['step_ms']:.0f} |"
        )


if __name__ == "__main__":
    main()
