"""What tuning costs whose frozen experts are not all in memory: peak memory and tokens/s.

    python benchmarks/streamed_lora.py FOLDER [--int4 FOLDER] [--arms ARM ...] [--text FILE]

Low-rank updates of attention and experts, a process for each arm, one after the other. ``resident``
has the experts as parameters; ``100%`` and less are ``train.expert_memory``; ``int4:25%`` reads the
folder with 4-bit experts. ``peft`` is transformers' model of the same folder under PEFT, whose
updates of fused experts are ``target_parameters``, with torch's AdamW on what trains. Its attention
targets are q, k, v and o. PEFT must be importable (PYTHONPATH).

``peak`` is VmHWM at the end: starting, training and all. ``rest`` is RSS after the last step.
Tokens/s are the median over all steps but the first. Losses of our arms on the same folder must be
the same numbers.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from report import write_results

RANK, ALPHA, LR = 8, 16, 1e-3
ARMS = ("resident", "100%", "50%", "25%", "int4:100%", "int4:25%", "peft")


def memory(key: str) -> float:
    """Return a line of the process's status in GiB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / (1 << 20)


def measure(step: Callable[[int], float], steps: int, tokens: int) -> dict[str, Any]:
    """Run steps that return their loss."""
    losses, seconds = [], []
    for number in range(steps):
        began = time.perf_counter()
        losses.append(step(number))
        seconds.append(time.perf_counter() - began)
    return {
        "tokens_per_s": tokens / statistics.median(seconds[1:] or seconds),
        "peak_gib": memory("VmHWM"),
        "rest_gib": memory("VmRSS"),
        "losses": losses,
    }


def ours(arm: str, folder: str, given: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Train with moeyard."""
    from moeyard.parallel.mesh import Mesh
    from moeyard.serving.frozen_experts import open_frozen
    from moeyard.training.read_config import complete_run_config
    from moeyard.training.trainer import Trainer

    train = {
        "parameters": "lora",
        "precision": given.precision,
        "steps": given.steps,
        "sequence_length": given.length,
        "batch_sequences": given.sequences,
        "recompute": given.recompute,
        "expert_memory": None if arm == "resident" else arm.partition(":")[2] or arm,
    }
    config = complete_run_config(
        {
            "run_dir": str(scratch),
            "start_from": folder,
            "data": {"source": given.text},
            "train": train,
            "lora": {"rank": RANK, "alpha": ALPHA},
            "optimizer": {"lr": LR, "weight_decay": 0},
        }
    )
    trainer = Trainer(config, scratch, Mesh(), open_source=open_frozen)
    found = measure(
        lambda step: trainer._step.run(step, stop_requested=False).loss,
        given.steps,
        given.length * given.sequences,
    )
    if trainer._source is not None:
        counts = trainer._source.statistics.totals()
        found["read_gib"] = counts["misses"] * trainer._source.slot_bytes / (1 << 30)
        trainer._source.close()
    return found


def peft(folder: str, given: argparse.Namespace) -> dict[str, Any]:
    """Train transformers' model under PEFT, on the same number of tokens of the same text."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if given.precision == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    lora = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    model = get_peft_model(model, lora).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0)
    text = torch.tensor(list(Path(given.text).read_bytes()[: 1 << 22]))

    def step(number: int) -> float:
        size = given.sequences * given.length
        ids = text[number * size :][:size].view(given.sequences, given.length)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return measure(step, given.steps, given.sequences * given.length)


def run_arm(given: argparse.Namespace) -> None:
    """Run one arm in this process and print its figures."""
    with tempfile.TemporaryDirectory() as scratch:
        if given.arm == "peft":
            found = peft(given.folder, given)
        else:
            folder = given.int4 if given.arm.startswith("int4") else given.folder
            found = ours(given.arm, folder, given, Path(scratch))
    print("RESULT " + json.dumps(found), flush=True)


def show(arm: str, found: dict[str, Any], peak: float) -> str:
    """Return a line of the table."""
    losses = " ".join(f"{loss:.4f}" for loss in found["losses"])
    share, read = found["peak_gib"] / peak, found.get("read_gib", 0.0)
    return (
        f"{arm:10s} {found['peak_gib']:8.2f} {share:6.2f} {found['rest_gib']:8.2f} "
        f"{found['tokens_per_s']:9.1f} {read:8.1f}  {losses}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--int4", help="folder with 4-bit experts")
    parser.add_argument("--arms", nargs="+", default=ARMS)
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--text", default="README.md")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--recompute", default="experts")
    parser.add_argument("--output", default="streamed_lora")
    given = parser.parse_args()
    if given.arm is not None:
        run_arm(given)
        return
    lines = [f"{'arm':10s} {'peak':>8s} {'share':>6s} {'rest':>8s} {'tokens/s':>9s} {'read':>8s}  "]
    lines[0] += "losses (peak, rest and read in GiB; share of the first arm's peak)"
    figures: dict[str, Any] = {}
    for arm in given.arms:
        command = [sys.executable, __file__, *sys.argv[1:], "--arm", arm]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
        result = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if not result:
            last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
            lines.append(f"{arm:10s} failed: {last[:200]}")
        else:
            figures[arm] = json.loads(result[0].removeprefix("RESULT "))
            first = next(iter(figures.values()))
            lines.append(show(arm, figures[arm], first["peak_gib"]))
        print(lines[-1] if len(lines) > 2 else "\n".join(lines), flush=True)
    path = write_results(given.output, {"arms": figures})
    path.with_suffix(".txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
