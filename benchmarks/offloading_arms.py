"""What benchmarks/offloading.py compares: our store with its options, llama.cpp and accelerate."""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from offloading_bed import Limits, Outcome

from moeyard.moe.folders.hf_config import from_hf

HERE = Path(__file__).parent
BF16 = 2


@dataclass(frozen=True, slots=True)
class Arm:
    """A command and what it may use."""

    name: str
    command: list[str]
    limits: Limits
    threads: int = 2

    @property
    def environment(self) -> dict[str, str]:
        """Variables of the command."""
        paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {"OMP_NUM_THREADS": str(self.threads), "PYTHONPATH": os.pathsep.join(paths)}


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of a folder's weights in bfloat16."""

    experts: int
    dense: int

    @staticmethod
    def of(folder: Path) -> "Sizes":
        """Read a folder of separate experts."""
        config = from_hf(json.loads((folder / "config.json").read_text()))
        assert config.moe is not None, f"{folder} has no experts"
        files = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        experts = len(config.moe_layers) * config.moe.num_experts
        total = experts * 3 * config.d_model * config.moe.d_expert * BF16
        return Sizes(total, files - total)


def choices_of(folder: Path) -> tuple[int, int]:
    """Return a model's MoE layers, and the experts that a token visits in each."""
    config = from_hf(json.loads((folder / "config.json").read_text()))
    assert config.moe is not None, f"{folder} has no experts"
    return len(config.moe_layers), config.moe.router.k


def ours(
    name: str,
    folder: Path,
    tokens: int,
    limits: Limits,
    memory: str | None,
    options: list[str],
    *more: str,
) -> Arm:
    """Return an arm of our own; ``memory`` None = all experts in memory."""
    command = [sys.executable, str(HERE / "offloading_child.py"), str(folder)]
    command += ["--tokens", str(tokens), *more]
    if memory is not None:
        command += ["--expert-memory", memory]
        for option in options:
            command += ["--option", option]
    return Arm(name, command, limits)


def llama(name: str, bench: Path, file: Path, tokens: int, limits: Limits, mode: str) -> Arm:
    """Return an arm of llama.cpp; ``mode`` is its way to load: mmap, none or dio."""
    command = [str(bench), "-m", str(file), "-p", "0", "-n", str(tokens), "-r", "2"]
    command += ["-t", "2", "-lm", mode, "-o", "jsonl"]
    return Arm(name, command, limits)


def accelerate(name: str, folder: Path, tokens: int, limits: Limits, layers: int) -> Arm:
    """Return an arm of accelerate with ``layers`` layers in memory, the others on disk."""
    command = [sys.executable, str(HERE / "offloading_accelerate.py"), str(folder)]
    command += ["--tokens", str(tokens), "--layers-in-memory", str(layers)]
    return Arm(name, command, limits)


def tokens_per_s(outcome: Outcome) -> float | None:
    """Return the speed of a run; of llama-bench that of its second turn."""
    if outcome.result is None:
        return None
    if "samples_ts" in outcome.result:
        return float(outcome.result["samples_ts"][-1])
    return float(outcome.result["tokens_per_s"])
