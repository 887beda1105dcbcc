"""How long do help and typos take, each in a fresh process?

python benchmarks/first_answers.py
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path

from moeyard.cli import COMMANDS, build_parser

from report import write_results

ROOT = Path(__file__).parent.parent
MOEYARD = Path(sys.executable).parent / "moeyard"
TIMES = 7
TYPO = "typo in a key"


def seconds_of(command: list[str], status: int) -> float:
    """Return the median time of a command that must end with ``status``."""
    found = []
    for _ in range(TIMES):
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, check=False)
        found.append(time.perf_counter() - started)
        assert done.returncode == status, done.stderr
    return statistics.median(found)


def main() -> None:
    """Print and write the medians."""
    names = list(build_parser()._subparsers._group_actions[0].choices)  # type: ignore[union-attr]
    assert len(names) == len(COMMANDS)
    medians = {"--help": seconds_of([str(MOEYARD), "--help"], 0)}
    for name in names:
        medians[f"{name} --help"] = seconds_of([str(MOEYARD), name, "--help"], 0)
    typo = [str(ROOT / "configs" / "train" / "tiny.yaml"), "train.stepz=5"]
    medians[f"train, {TYPO}"] = seconds_of([str(MOEYARD), "train", *typo], 2)
    program = [sys.executable, "-m", "moeyard.training"]
    medians[f"python -m moeyard.training, {TYPO}"] = seconds_of([*program, *typo], 2)
    for what, seconds in medians.items():
        print(f"{what:45} {seconds:.3f} s")
    write_results("first_answers", {"median_seconds": medians, "times": TIMES})


if __name__ == "__main__":
    main()
