"""Does any option of parallel training change the numbers of 100 steps?

    python benchmarks/invariance.py [--only NAME ...] [--work FOLDER]

A small model with a shared expert, router bias and z loss trains on one process, and then once for
each arm (invariance_arms.py) on four ranks, with the reference backend. Compared at every step:
loss, clip norm, all gradients, all weights and the routers' biases, each relative to its largest
value (tests/parallel/equivalence.py), and routed rows, which must be the same. An arm that is done
is not run again, unless ``--only`` names it.

In fp32 the order of a sum changes the last digits. Sooner or later a token takes another expert
because of that, and from there on runs differ. So the first three steps are compared, and 100 steps
that replay the routes of one process.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "tests" / "parallel"))

from equivalence import WORKER, differences, gathered_from  # noqa: E402
from invariance_arms import ARMS, CONFIG, HALF, RANKS, STEPS, TEXT, Arm  # noqa: E402
from report import write_results  # noqa: E402

FEW_STEPS = 3
AT_ONCE = 6
"""Arms of a launch."""
SHOWN = (1, 3, 10, 30, 100)
LIMITS = {"fp64": 1e-12, "fp32": 1e-5}
MODES = ("fp64", "fp32", "fp32 replayed")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", help="names of arms, or parts of them")
    parser.add_argument("--work", type=Path, default=Path("runs/invariance"))
    arguments = parser.parse_args()
    work: Path = arguments.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    (work / "text.txt").write_text(TEXT)
    CONFIG["data"]["source"] = str(work / "text.txt")
    (work / "run.yaml").write_text(json.dumps(CONFIG))
    found = work / "rows.json"
    rows = json.loads(found.read_text()) if found.exists() else {}
    planned = [
        (mode, name)
        for mode in MODES
        for name, arm in ARMS.items()
        if mode != "fp32" or arm.first_half is None
    ]
    only = arguments.only
    wanted = [
        (mode, name)
        for mode, name in planned
        if any(part in f"{mode}: {name}" for part in only or [])
        or (not only and f"{mode}: {name}" not in rows)
    ]
    started = time.monotonic()
    for together in batches(wanted):
        for key, row in run_arms(together, work):
            rows[key] = row
            found.write_text(json.dumps(rows))
            seconds = time.monotonic() - started
            print(f"{key}: {row['worst']:.1e}, {seconds:.0f} s", file=sys.stderr, flush=True)
    keys = [f"{mode}: {name}" for mode, name in planned]
    rows = {key: rows[key] for key in keys if key in rows}
    for line in table(rows):
        print(line)
    print("written to", write_results("invariance", {"question": __doc__, "rows": rows}).name)
    return 0 if all(row["holds"] for row in rows.values()) else 1


def batches(wanted: list[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """Yield arms that share a launch, to load torch less often."""
    for mode in MODES:
        names = [name for that, name in wanted if that == mode]
        for first in range(0, len(names), AT_ONCE):
            yield [(mode, name) for name in names[first : first + AT_ONCE]]


def run_arms(together: list[tuple[str, str]], work: Path) -> Iterator[tuple[str, dict]]:
    """Run arms, and one process unless it has run; yield how they compare."""
    cases: dict[str, dict] = {}
    for mode, name in together:
        arm, precision = ARMS[name], mode.split()[0]
        common = [f"train.precision={precision}", *arm.like]
        one = one_of(mode, arm)
        if not (work / f"{one}-0.pt").exists():
            launch(work, 1, {one: {"overrides": [*common, "monitor.routes={}"], "until": STEPS}})
        steps = FEW_STEPS if mode == "fp32" else STEPS
        case = {"overrides": [*common, *arm.overrides], "apart": arm.apart, "until": steps}
        case |= {"replays": one} if "replayed" in mode else {}
        if arm.first_half is not None:
            half = f"half of {name}"
            first = case | {"overrides": [*common, *arm.first_half], "until": HALF, "saves": True}
            if arm.first_ranks == RANKS:
                cases[half] = first
            else:
                launch(work, arm.first_ranks, {half: first})
            case |= {"resumes": half}
        cases[name] = case
    launch(work, RANKS, cases)
    for mode, name in together:
        yield f"{mode}: {name}", compare(mode, name, work)


def one_of(mode: str, arm: Arm) -> str:
    """Return the name of the run on one process that an arm is compared with."""
    like = re.sub(r"\W+", "-", " ".join(arm.like))
    return f"one-{mode.split()[0]}-{like or 'plain'}"


def compare(mode: str, name: str, work: Path) -> dict:
    """Compare what an arm and one process have left, and remove what the arm has."""
    arm = ARMS[name]
    actual = gathered_from(work, name, RANKS)
    if arm.first_half is not None:
        actual = gathered_from(work, f"half of {name}", arm.first_ranks) + actual
    expected = gathered_from(work, one_of(mode, arm), 1)[: len(actual)]
    for path in work.iterdir():
        if path.name.removeprefix("half of ").startswith(f"{name}-"):
            path.unlink()
        elif path.name.removeprefix("half of ") == name:
            shutil.rmtree(path)
    return compared(mode, actual, expected)


def launch(work: Path, ranks: int, cases: dict) -> None:
    """Run cases to their end."""
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += [WORKER, str(work / "run.yaml"), str(work), json.dumps(cases)]
    with (work / "log.txt").open("a") as log:
        subprocess.run(command, stdout=log, stderr=log, cwd="/", check=True)


def compared(mode: str, actual: list[dict], expected: list[dict]) -> dict:
    """Return the largest relative differences, by kind and by step, and what must be equal."""
    pairs = list(zip(actual, expected, strict=True))
    steps = [differences(a, e) for a, e in pairs]
    numbered = list(enumerate(pairs, start=1))
    other_rows = [number for number, (a, e) in numbered if not a["counts"].equal(e["counts"])]
    biases = [key for key in expected[0]["weights"] if key.endswith("e_score_correction_bias")]
    assert biases, "the router has a bias"
    other_bias = [
        number
        for number, (a, e) in numbered
        if not all(a["weights"][key].equal(e["weights"][key]) for key in biases)
    ]
    worst = max(max(step.values()) for step in steps)
    limit = LIMITS.get(mode)
    return {
        "by_kind": {kind: max(step[kind] for step in steps) for kind in steps[0]},
        "by_step": {n: max(steps[n - 1].values()) for n in SHOWN if n <= len(steps)},
        "worst": worst,
        "first_step_with_other_rows": min(other_rows, default=None),
        "first_step_with_other_bias": min(other_bias, default=None),
        "holds": limit is None or worst <= limit,
    }


def table(rows: dict[str, dict]) -> Iterator[str]:
    """Yield the table as text."""
    kinds = ("loss", "grad_norm", "gradients", "weights")
    for mode in MODES:
        limit = LIMITS.get(mode)
        promise = f"must be at most {limit:g}" if limit else "measured"
        steps = [step for step in SHOWN if step <= (FEW_STEPS if mode == "fp32" else STEPS)]
        yield f"{mode}: largest relative differences from one process, {steps[-1]} steps, {promise}"
        head = f"  {'arm':56}" + "".join(f"{kind:>10}" for kind in kinds) + "  | in step"
        yield head + "".join(f"{step:>8}" for step in steps) + "  other rows, bias from step"
        for key, row in rows.items():
            row_mode, _, name = key.partition(": ")
            if row_mode != mode:
                continue
            by_kind = "".join(f"{row['by_kind'][kind]:10.1e}" for kind in kinds)
            by_step = "".join(f"{value:8.0e}" for value in row["by_step"].values())
            others = row["first_step_with_other_rows"], row["first_step_with_other_bias"]
            seen = ", ".join("never" if step is None else str(step) for step in others)
            verdict = "" if row["holds"] else "  FAULT"
            yield f"  {name:56}{by_kind}  |        {by_step}  {seen}{verdict}"
        yield ""


if __name__ == "__main__":
    sys.exit(main())
