"""Answers from a model whose experts do not fit into memory: what is gained, against whom?

    python benchmarks/offloading_models.py MODELS
    python benchmarks/offloading_gguf.py MODELS/4b MODELS/4b.gguf
    sudo python benchmarks/offloading.py MODELS --trained MODEL_DIR --llama LLAMA_BENCH

Every run is a process in cgroups that limit its reads of the disk, and its memory with the page
cache. One answer at a time. Parts:

trained  A really trained model, a quarter and a half of its experts in memory: on demand, each
         predictor, an oracle of set recall, everything on.
sweep    A random model of 1 G parameters: on demand, and oracles of set recall.
early    Models whose routers choose early (pre-gated, pre-attention): on demand, and with reads
         that begin when the router has chosen, alone and with a predictor, or an oracle of set
         recall, for the layers that have not chosen. Random models, or one that was trained.
peers    llama.cpp on the same bits, at equal cache bytes and at an equal limit of the process.
papers   accelerate with layers on disk, the baseline of papers.

Each part first prints its bound: C seconds of computing for each token, M seconds of reading what
misses; perfect overlap gives (C + M) / max(C, M). Then arms take turns; figures are medians, and
ratios are medians of the turns' ratios. --dry runs every arm once on tiny models.

Under the limit of a control group a disk that was idle is faster for a while, so reading ahead can
gain nothing there. Hence trained, sweep and early have a disk without credit (paced_disk.py).
"""

import argparse
import math
import statistics
import sys
from pathlib import Path

from offloading_arms import choices_of, tokens_per_s
from offloading_bed import Limits, Outcome, run
from offloading_cases import Case, Cases

from report import write_results

BOUND_RUNS = 3
"""Of the model in memory: some machines compute at two speeds, minute by minute."""
PARTS = ("trained", "sweep", "early", "peers", "papers")


def measure(case: Case) -> list[dict]:
    """Let the arms take turns and return a row for each."""
    speeds: dict[str, list[float]] = {arm.name: [] for arm in case.arms}
    outcomes: dict[str, list[Outcome]] = {arm.name: [] for arm in case.arms}
    for _ in range(case.turns):
        for arm in case.arms:
            outcome = run(arm.command, arm.limits, case.folder, arm.environment)
            outcomes[arm.name].append(outcome)
            speed = tokens_per_s(outcome)
            if speed is None:
                print(f"  {arm.name}: {outcome.problem}", flush=True)
            else:
                speeds[arm.name].append(speed)
    base = speeds[case.arms[0].name]
    return [_row(name, speeds[name], base, outcomes[name]) for name in speeds]


def find_bound(case: Case) -> dict | None:
    """Measure C and M and print the bound; None for arms that are not ours."""
    mine = [arm for arm in case.arms if "offloading_child.py" in arm.command[1]]
    resident = next((arm for arm in mine if "resident" in arm.name), None)
    if resident is None:
        return None
    on_demand = next(arm for arm in mine if arm is not resident)
    reading = run(on_demand.command, Limits(), case.folder, on_demand.environment)
    computing = [
        run(resident.command, Limits(), case.folder, resident.environment)
        for _ in range(min(BOUND_RUNS, case.turns))
    ]
    problems = [outcome.problem for outcome in (reading, *computing) if outcome.result is None]
    if problems:
        print(f"  no bound: {problems[0]}")
        return None
    c = statistics.median(1 / (outcome.result or {})["tokens_per_s"] for outcome in computing)
    assert reading.result is not None, "it had no problem"
    m = reading.result["bytes_read"] / case.tokens / (case.rate * 1e6)
    bound = (c + m) / max(c, m)
    print(
        f"  C = {1e3 * c:.1f} ms, M = {1e3 * m:.1f} ms "
        f"({reading.result['bytes_read'] / case.tokens / 1e6:.1f} MB a token at "
        f"{case.rate:g} MB/s): perfect overlap gives {bound:.2f}x of on demand",
        flush=True,
    )
    found = {"compute_s": c, "reading_s": m, "bound": bound}
    if case.is_early:
        found["one_layer_bound"] = one_layer_bound(c, m, case, reading.result)
        print(f"  one layer ahead: at most {found['one_layer_bound']:.2f}x", flush=True)
    return found


def one_layer_bound(c: float, m: float, case: Case, result: dict) -> float:
    """Return the bound for reads that begin one layer early, and no earlier.

    A layer takes the longer of computing and of reading what the next one misses. How many that
    are varies from layer to layer: the reads of one layer cannot begin while another one needs
    none. Misses are taken as independent of each other.
    """
    layers, k = choices_of(case.folder)
    missed = (result["misses"] + result["prefetch_late"]) / case.tokens / layers
    if missed == 0:
        return 1.0
    read_s, share = m / layers / missed, missed / k
    layer_s = sum(
        math.comb(k, n) * share**n * (1 - share) ** (k - n) * max(c / layers, n * read_s)
        for n in range(k + 1)
    )
    return (c + m) / (layers * layer_s)


def _row(name: str, speeds: list[float], base: list[float], outcomes: list[Outcome]) -> dict:
    last = outcomes[-1]
    row = {
        "arm": name,
        "tokens_per_s": statistics.median(speeds) if speeds else None,
        "lowest": min(speeds, default=None),
        "highest": max(speeds, default=None),
        "times_first_arm": None,
        "problem": last.problem,
        "peak_mb": last.peak_bytes / 1e6,
        "peak_anonymous_mb": last.peak_anonymous_bytes / 1e6,
        "disk_mb_in_all": last.disk_bytes / 1e6,
    }
    if speeds and len(speeds) == len(base):
        pairs = zip(speeds, base, strict=True)
        row["times_first_arm"] = statistics.median(mine / first for mine, first in pairs)
    result = last.result or {}
    if "hits" in result:
        needed = result["hits"] + result["misses"] + result["prefetch_late"]
        row |= {"hits_percent": 100 * result["hits"] / needed}
        row |= {"mb_a_token": result["bytes_read"] / result["tokens"] / 1e6}
        row |= {"stall_ms_a_token": 1e3 * result["stall_s"] / result["tokens"]}
    answers = [outcome.result or {} for outcome in outcomes]
    row["texts"] = sorted({" | ".join(a["texts"]) for a in answers if "texts" in a})
    row["logits"] = sorted({" ".join(a["logits"]) for a in answers if "logits" in a})
    return row


def difference(rows: list[dict]) -> str | None:
    """Return the first forward whose logits differ, and what each arm had there; None if none."""
    runs = {run for row in rows for run in row["logits"]}
    forwards = zip(*(run.split() for run in runs), strict=True)
    first = next((n for n, hashes in enumerate(forwards) if len(set(hashes)) > 1), None)
    if first is None:
        return None
    hashes = {row["arm"]: {run.split()[first] for run in row["logits"]} for row in rows}
    texts = {row["arm"]: row["texts"] for row in rows}
    return f"from forward {first} on: {hashes}, {texts}"


def show(row: dict) -> None:
    """Print a row."""

    def text(name: str, form: str) -> str:
        value = row.get(name)
        return "-" if value is None else format(value, form)

    print(
        f"  {row['arm']:28} {text('tokens_per_s', '.2f'):>8} "
        f"({text('lowest', '.2f')}-{text('highest', '.2f')}) "
        f"{text('times_first_arm', '.2f'):>6}x  hits {text('hits_percent', '.0f'):>3} %  "
        f"{text('mb_a_token', '.1f'):>6} MB/token  stall {text('stall_ms_a_token', '.1f'):>6} ms  "
        f"peak {text('peak_mb', '.0f'):>5} MB (anonymous {text('peak_anonymous_mb', '.0f')})  "
        f"disk {text('disk_mb_in_all', '.0f')} MB in all"
        f"{'  ' + row['problem'] if row['problem'] else ''}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, help="folder of benchmarks/offloading_models.py")
    parser.add_argument("--trained", type=Path, help="folder of a trained model")
    parser.add_argument("--llama", type=Path, help="the program llama-bench")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--peer-model", default="4b", help="with a GGUF twin")
    parser.add_argument("--peer-shares", nargs="+", type=float, default=[0.5, 0.25])
    parser.add_argument("--rate", type=float, default=800, help="MB/s")
    parser.add_argument("--trained-rate", type=float, default=400, help="MB/s")
    parser.add_argument("--sweep-rate", type=float, default=1600, help="MB/s")
    parser.add_argument("--sweep-budgets", nargs="+", default=["50%", "80%"])
    parser.add_argument("--budgets", nargs="+", default=["25%", "50%"])
    parser.add_argument("--early-budget", default="75%")
    parser.add_argument("--early-trained", type=Path, help="folder, in place of random models")
    parser.add_argument("--early-predictors", nargs="*", default=[])
    parser.add_argument("--predictors", nargs="*", default=["next_gates", "previous_layers"])
    parser.add_argument("--recalls", nargs="*", type=float, default=[0.5, 0.7, 0.9])
    parser.add_argument("--policy", default="lru", help="of the arm with everything on")
    parser.add_argument(
        "--routes", type=Path, help="route file of the trained model: the policy is future_use"
    )
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--tokens", type=int, help="of every answer, in place of a part's number")
    parser.add_argument("--dry", action="store_true", help="run every arm once on tiny models")
    arguments = parser.parse_args()
    if arguments.dry:
        arguments.pairs = 1
    tables, differing = {}, []
    for case in Cases(arguments):
        print(case.name, flush=True)
        bound = find_bound(case)
        rows = measure(case)
        for row in rows:
            show(row)
        where = difference(rows)
        if where is not None:
            print(f"  LOGITS DIFFER {where}", flush=True)
            differing.append(case.name)
        tables[case.name] = {"rate_mb_s": case.rate, "bound": bound, "rows": rows}
    if not arguments.dry:
        write_results("offloading", {"pairs": arguments.pairs, "cases": tables})
    if differing:
        sys.exit(f"answers are not exact in {', '.join(differing)}")


if __name__ == "__main__":
    main()
