"""Reliability: ranks that differ in one thing never train; the sentence names it and both values.

    python scripts/chaos/other_ranks.py

Two ranks of a launch get different arguments, code, data or run folders. Right is: exit status 1 or
2, a sentence that names the key and the rank, no step taken, and no traceback of a worker.
"""

import re
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

from small_runs import Ended, in_parallel, launch, torchrun, work_folder
from verdict import Verdict

RANK_1 = """
import os, sys
folder = {folder!r}
if os.environ["RANK"] == "1":
    {change}
from moeyard.training.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@dataclass(frozen=True)
class Case:
    name: str
    change: str
    """Python that only rank 1 runs, before anything of moeyard is imported."""
    says: str
    """Pattern of the sentence."""
    overrides: list[str] = field(default_factory=list)


def argument(name: str, says: str, *overrides: str) -> Case:
    return Case(name, f"sys.argv.append({name!r})", says, list(overrides))


def in_program(*lines: str) -> str:
    return "\n    ".join(lines)


CASES = [
    argument("optimizer.lr=0.1", r"optimizer\.lr is 0\.1 on rank 1 .*, but 0\.003 on rank 0"),
    argument("seed=9", r"seed is 9 on rank 1 .*, but 3 on rank 0"),
    argument("train.steps=9", r"train\.steps is 9 on rank 1"),
    argument("train.batch_sequences=16", r"train\.batch_sequences is 16 on rank 1"),
    argument("checkpoint.every=5", r"checkpoint\.every is 5 on rank 1"),
    argument("model.d_model=64", r"model\.d_model is 64 on rank 1"),
    argument("parallel.ep=2", r"parallel\.ep is 2 on rank 1"),
    argument("parallel.dense=fsdp", r"parallel\.dense is 'fsdp' on rank 1"),
    argument("model.moe=null", r"d_ff is missing"),
    argument("zzz=1", r"zzz is not a known key"),
    Case(
        "another torch",
        in_program("import torch", "torch.__version__ = '2.0.0'"),
        r"torch is '2\.0\.0' on rank 1",
    ),
    Case(
        "another source file",
        in_program(
            "from moeyard.training import agreement",
            "original = agreement.sha256_of",
            "def sha256_of(path):",
            "    return 'ffff' if path.name == 'step.py' else original(path)",
            "agreement.sha256_of = sha256_of",
        ),
        r"moeyard/training/step\.py is 'ffff' on rank 1",
    ),
    Case(
        "another folder of its own",
        in_program("os.chdir(folder + '/elsewhere')"),
        r"run_dir is 'runs/.*', and rank 1 on .* does not see there what rank 0 wrote",
        ["run_dir=runs/relative"],
    ),
    Case(
        "other first weights",
        in_program(
            "import torch",
            "from moeyard.training import setup",
            "original = setup.initialize",
            "def initialize(decoder, seed):",
            "    original(decoder, seed)",
            "    decoder.embed_tokens.weight.data[3, 3] += 0.5",
            "setup.initialize = initialize",
        ),
        r"the hash of the weight embed_tokens\.weight is .* on rank 1",
    ),
    Case(
        "other data",
        in_program(
            "from moeyard.training import setup",
            "original = setup.open_shards",
            "def open_shards(*a, **k):",
            "    train, held_out = original(*a, **k)",
            "    object.__setattr__(train.facts, 'file_sha256', 'ab')",
            "    return train, held_out",
            "setup.open_shards = open_shards",
        ),
        r"the hash of the training data is 'ab' on rank 1",
    ),
]


def run(case: Case, number: int, folder: Path) -> tuple[Case, Ended, bool]:
    program = folder / f"case{number}.py"
    program.write_text(RANK_1.format(folder=str(folder), change=case.change))
    run_dir = folder / f"run{number}"
    overrides = [f"run_dir={run_dir}", "parallel.timeout_s=20", *case.overrides]
    command = torchrun(2, folder / "run.yaml", *overrides, program=[str(program)])
    ended = launch(command, folder / f"log{number}.txt", cwd=str(folder))
    return case, ended, bool(re.search(r"^step=", ended.log, re.MULTILINE))


def main() -> None:
    verdict, folder = Verdict(), work_folder()
    (folder / "elsewhere").mkdir()
    numbered = list(enumerate(CASES))
    for case, ended, has_trained in in_parallel(lambda n: run(n[1], n[0], folder), numbered):
        said = [s for s in ended.sentences if re.search(case.says, s)]
        problems = []
        if not said:
            problems.append("not said")
        if ended.status not in (1, 2):
            problems.append(f"exit {ended.status}")
        if has_trained:
            problems.append("took a step")
        if ended.has_traceback:
            problems.append("a worker's traceback")
        facts = said[0] if said else ended.log[-2500:]
        verdict.check(
            case.name, not problems, " ".join([*problems, f"{ended.seconds:.0f} s:", facts])
        )
    shutil.rmtree(folder)
    verdict.end()


if __name__ == "__main__":
    sys.exit(main())
