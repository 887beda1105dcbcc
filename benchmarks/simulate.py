"""Does `moeyard simulate` predict the steps of real runs that it was not fitted to?

    python benchmarks/simulate.py FOLDER [--steps 10] [--only NAME ...] [--no-memory]

Two nodes of two ranks with half a core each and slow links (network_bed.py). Every row is a run of
the training program, four ranks, of which FOLDER keeps the run's folder. A row that is there is not
measured again, so an interrupted benchmark goes on where it was. The rows of FITTED give the
cluster's description (`--fit` of the command). Those of PREDICTED are only predicted: other widths,
choices, ranks, tokens, link rates, engines, paths and a skewed router. Formulas were corrected by
them, so the rows of CHECKED were measured only when the formulas were final. Loads of experts are
those that each run recorded. Memory: what a rank keeps, from fsdp_memory.json, and what autograd
saves (simulate_memory.py). Needs root; about ten minutes.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from simulate_memory import memory_rows

from moeyard.errors import MoeyardError
from moeyard.parallel.simulation.cluster import Cluster, read_cluster, to_yaml
from moeyard.parallel.simulation.fit import Measured, fitted
from moeyard.training.on_paper import measured_run

from network_bed import Network
from network_links import bits_per_s
from report import write_results

HERE = Path(__file__).parent
BED = HERE / "simulate_bed.yaml"
WANTED = 0.15
RANKS = 4
FAST, MIDDLE, SLOW = ("1gbit", "4gbit"), ("500mbit", "2gbit"), ("200mbit", "1gbit")
"""Between nodes and inside a node."""
MODEL = {"d_model": 256, "num_layers": 4, "num_heads": 4, "head_dim": 64, "max_positions": 2048}
MOE = {"num_experts": 8, "d_expert": 512}
K2 = {"kind": "topk", "k": 2, "balance_loss": 0.01}
TRAIN = {"sequence_length": 128, "batch_sequences": 8, "log_every": 1, "eval_sequences": 4}


def row(
    links: tuple[str, str],
    ep: int,
    *,
    model: dict | None = None,
    moe: dict | None = None,
    router: dict | None = None,
    train: dict | None = None,
    **parallel: Any,
) -> dict:
    """Return the links and the changed sections of a run."""
    experts = {**MOE, **(moe or {}), "router": router or K2}
    return {
        "links": links,
        "model": {**MODEL, **(model or {}), "moe": experts},
        "train": {**TRAIN, **(train or {})},
        "parallel": {"ep": ep, **parallel},
    }


FITTED = {
    "base ep4": row(FAST, 4),
    "base ep1": row(FAST, 1),
    "base ep2": row(FAST, 2),
    "base fsdp ep4": row(FAST, 4, dense="fsdp"),
    "wide dense ep4": row(
        FAST, 4, model={"d_model": 512, "num_layers": 2, "num_heads": 8}, moe={"d_expert": 128}
    ),
    "tiny ep4": row(
        FAST,
        4,
        model={"d_model": 64, "num_heads": 1},
        moe={"d_expert": 64},
        train={"sequence_length": 64, "batch_sequences": 4},
    ),
    "long ep1": row(
        FAST,
        1,
        model={"num_layers": 2},
        moe={"d_expert": 128},
        train={"sequence_length": 1024, "batch_sequences": 4},
    ),
    "base ep4 slow": row(SLOW, 4),
}
PREDICTED = {
    "width 384 ep4": row(FAST, 4, model={"d_model": 384, "num_heads": 6}),
    "16 experts k=4 ep4": row(
        FAST, 4, moe={"num_experts": 16, "d_expert": 256}, router={**K2, "k": 4}
    ),
    "k=1 ep4": row(FAST, 4, router={**K2, "k": 1}),
    "twice the tokens ep4": row(FAST, 4, train={"batch_sequences": 16}),
    "half of the tokens ep4": row(FAST, 4, train={"sequence_length": 64}),
    "fsdp width 384 ep2": row(FAST, 2, model={"d_model": 384, "num_heads": 6}, dense="fsdp"),
    "skewed (hash) ep4": row(FAST, 4, router={"kind": "hash", "k": 2, "table": "random"}),
    "recompute ep4": row(FAST, 4, train={"recompute": True}),
    "shared and dense ep4": row(
        FAST, 4, model={"dense_layers": [0], "d_ff": 1024}, moe={"d_shared": 256}
    ),
    "hierarchical ep4": row(FAST, 4, path="hierarchical"),
    "2 chunks slow ep4": row(SLOW, 4, chunks=2),
    "width 384 middle ep4": row(MIDDLE, 4, model={"d_model": 384, "num_heads": 6}),
    "accumulation 2 middle ep2": row(MIDDLE, 2, train={"batch_sequences": 16, "accumulation": 2}),
    "fsdp middle ep1": row(MIDDLE, 1, dense="fsdp"),
}
CHECKED = {
    "width 320 ep4": row(FAST, 4, model={"d_model": 320, "num_heads": 5}),
    "6 layers ep4": row(FAST, 4, model={"num_layers": 6}),
    "12 experts k=3 middle ep4": row(
        MIDDLE, 4, moe={"num_experts": 12, "d_expert": 384}, router={**K2, "k": 3}
    ),
    "wide experts middle ep2": row(MIDDLE, 2, moe={"d_expert": 1024}),
    "fsdp slow ep4": row(SLOW, 4, dense="fsdp"),
    "twice the tokens slow ep2": row(SLOW, 2, train={"batch_sequences": 16}),
    "hierarchical 2 chunks slow ep4": row(SLOW, 4, path="hierarchical", chunks=2),
    "k=1 long middle ep4": row(MIDDLE, 4, router={**K2, "k": 1}, train={"sequence_length": 256}),
}
ROWS = FITTED | PREDICTED | CHECKED


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where runs are kept")
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--only", nargs="+", default=list(ROWS), metavar="NAME", help="rows")
    parser.add_argument("--no-memory", action="store_true", help="leave memory out")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    try:
        measure(folder, arguments.only, arguments.steps)
        figures = compare(folder)
        if not arguments.no_memory:
            figures["memory"] = memory_rows()
    except MoeyardError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for line in table(figures):
        print(line)
    question = "seconds of a step, predicted from other runs and measured, on two slow nodes"
    print("written to", write_results("simulate", {"question": question, **figures}).name)
    return 0


def measure(folder: Path, names: list[str], steps: int) -> None:
    """Run every row that is not there yet, those with equal links on one network."""
    text = folder / "corpus.txt"
    pages = sorted((HERE.parent / "docs").rglob("*.md"))
    text.write_text("\n".join(page.read_text(encoding="utf-8") for page in pages))
    missing = [name for name in names if not is_done(place_of(folder, name), steps)]
    began, done = time.perf_counter(), 0
    for links in (FAST, MIDDLE, SLOW):
        here = [name for name in missing if ROWS[name]["links"] == links]
        if not here:
            continue
        with Network(nodes=2, ranks_per_node=2, inter=links[0], intra=links[1]) as network:
            for name in here:
                train(network, folder, name, text, steps)
                done += 1
                spent = time.perf_counter() - began
                print(f"{done}/{len(missing)} {spent:.0f} s: {name}", file=sys.stderr, flush=True)


def train(network: Network, folder: Path, name: str, text: Path, steps: int) -> None:
    """Train one row with the program that a user starts."""
    values = {key: value for key, value in ROWS[name].items() if key != "links"}
    run_dir = place_of(folder, name)
    values |= {
        "run_dir": str(run_dir),
        "data": {"source": str(text)},
        "checkpoint": {"every": 10 * steps},
    }
    values["train"] = {**values["train"], "steps": steps}
    config = folder / f"{run_dir.name}.yaml"
    config.write_text(yaml.safe_dump(values))
    network.run(["-m", "moeyard.training", str(config)], timeout_s=300)


def place_of(folder: Path, name: str) -> Path:
    return folder / name.replace(" ", "_").replace("(", "").replace(")", "").replace("=", "")


def is_done(run_dir: Path, steps: int) -> bool:
    """Whether a row's run has recorded enough steps."""
    log = run_dir / "metrics.jsonl"
    return log.is_file() and len(log.read_text().splitlines()) >= min(steps, 4)


def compare(folder: Path) -> dict[str, Any]:
    """Fit to the rows of FITTED that are there, and predict all that are."""
    there = {name: read(folder, name) for name in ROWS if is_done(place_of(folder, name), 4)}
    fitting = [run for name, run in there.items() if name in FITTED]
    if not fitting:
        raise MoeyardError("no row to fit to was measured; leave --only out.")
    cluster = fitted(read_cluster(BED), fitting)
    (folder / "cluster.yaml").write_text(to_yaml(cluster))
    rows = [compared(name, run, cluster) for name, run in there.items()]
    return {"cluster": cluster.model_dump(mode="json"), "rows": rows}


def read(folder: Path, name: str) -> Measured:
    """Return a row's steps, with the links that it had."""
    inter, intra = (bits_per_s(rate) / 8 for rate in ROWS[name]["links"])
    found = measured_run(place_of(folder, name))
    assert found.num_gpus == RANKS
    return replace(found, name=name, bandwidths={"between_nodes": inter, "inside_node": intra})


def compared(name: str, run: Measured, cluster: Cluster) -> dict[str, Any]:
    """Return a row of the table."""
    predicted = run.predict(cluster)
    return {
        "name": name,
        "links": ROWS[name]["links"],
        "set": set_of(name),
        "measured_s": run.step_s,
        "predicted_s": predicted.step_s,
        "error": predicted.step_s / run.step_s - 1,
        "measured_phases_s": dict(run.phases_s),
        "predicted_phases_s": predicted.phases_s,
        "exposed_s": predicted.exposed_s,
        "share": max((p.share for p in predicted.placed), default=1.0),
    }


def set_of(name: str) -> str:
    if name in FITTED:
        return "fitted"
    return "predicted" if name in PREDICTED else "checked"


def table(figures: dict[str, Any]) -> Iterator[str]:
    """Yield the tables in Markdown."""
    phases = ("forward", "backward", "reduce", "optimizer")
    yield (
        "| row | set | between nodes | measured ms | predicted ms | error | "
        + " | ".join(f"{phase} ms" for phase in phases)
        + " |"
    )
    yield "|---" * (6 + len(phases)) + "|"
    for one in figures["rows"]:
        cells = [
            f"{1000 * one['measured_phases_s'][p]:.0f} / {1000 * one['predicted_phases_s'][p]:.0f}"
            for p in phases
        ]
        yield (
            f"| {one['name']} | {one['set']} | {one['links'][0]} "
            f"| {1000 * one['measured_s']:.0f} | {1000 * one['predicted_s']:.0f} "
            f"| {one['error']:+.1%} | {' | '.join(cells)} |"
        )
    for kind in ("fitted", "predicted", "checked"):
        errors = sorted(abs(one["error"]) for one in figures["rows"] if one["set"] == kind)
        if errors:
            close = sum(error <= WANTED for error in errors)
            yield (
                f"{kind}: {close} of {len(errors)} within "
                f"{WANTED:.0%}, median error {errors[len(errors) // 2]:.1%}, largest "
                f"{errors[-1]:.1%}"
            )
    for one in figures.get("memory", []):
        yield (
            f"memory, {one['what']}: {one['case']}: measured {one['measured'] / 2**20:.1f} MiB, "
            f"predicted {one['predicted'] / 2**20:.1f} MiB, {one['error']:+.1%}"
        )


if __name__ == "__main__":
    sys.exit(main())
