"""Does ``parallel.dense: deepspeed`` change the numbers of 50 steps, and what does ZeRO clip?

    python benchmarks/deepspeed_engine.py [--work FOLDER]

A small model trains on two ranks with gloo. For expert-parallel degrees 1 and 2, ZeRO stages 0 to 3
run the steps of ddp. Compared at every step: loss, norm, all gradients and all weights, each
relative to its largest value (tests/parallel/equivalence.py). Then a run moves from ddp to ZeRO and
on to fsdp, and what they save and export is compared with ddp alone. Last comes one clipped step of
DeepSpeed's own MoE layer and engine. Needs ``pip install 'moeyard[deepspeed]'``.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from moeyard.training.checkpoints.checkpoint import StoredTensors

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tests" / "parallel"))

from equivalence import WORKER, differences, gathered_from  # noqa: E402

STEPS, FEW = 50, 10
STAGES = (0, 1, 2, 3)
RUNS_WORKER = str(ROOT / "tests" / "training" / "fsdp_worker.py")
CLIP_WORKER = str(ROOT / "tests" / "training" / "deepspeed_clip_worker.py")
TEXT = "".join(f"def f{n}(a, b={n % 7}):\n    return a * {n} + b ** {n % 5}\n" for n in range(900))
CONFIG = {
    "seed": 3,
    "run_dir": "unset",
    "model": {
        "d_model": 64,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "max_positions": 256,
        "moe": {
            "num_experts": 8,
            "d_expert": 32,
            "d_shared": 32,
            "router": {"kind": "topk", "k": 2, "balance_loss": 0.01, "z_loss": 0.001},
        },
    },
    "data": {"tokenizer": "bytes"},
    "train": {"steps": STEPS, "sequence_length": 64, "batch_sequences": 16, "accumulation": 2},
    "optimizer": {"lr": 0.003, "warmup_steps": 5, "clip_norm": 0.3},
    "checkpoint": {"every": 5, "keep": 9},
    "parallel": {"backend": "torch"},
}
SHOWN = ("loss", "grad_norm", "gradients", "weights")
BF16 = "train.precision=bf16"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/deepspeed_engine"))
    work: Path = parser.parse_args().work.absolute()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    (work / "text.txt").write_text(TEXT)
    CONFIG["data"]["source"] = str(work / "text.txt")
    (work / "run.yaml").write_text(json.dumps(CONFIG))
    same_numbers(work)
    moved_runs(work)
    own_clipping(work)
    return 0


def zero(stage: int, **options: object) -> list[str]:
    given = json.dumps({"zero_stage": stage, **options})
    return ["parallel.dense=deepspeed", f"parallel.deepspeed={given}"]


def launch(script: str, *arguments: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*command, script, *arguments], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{script} failed:\n{(done.stdout + done.stderr)[-4000:]}")


def same_numbers(work: Path) -> None:
    """Run all engines and print how far they are from ddp."""
    arms = {}
    for ep in (1, 2):
        arms[f"ddp, EP {ep}"] = [f"parallel.ep={ep}"]
        for stage in STAGES:
            arms[f"ZeRO {stage}, EP {ep}"] = [f"parallel.ep={ep}", *zero(stage)]
    for stage in STAGES[1:]:
        offloaded = zero(stage, offload_optimizer=True)
        arms[f"ZeRO {stage} offloaded, EP 2"] = ["parallel.ep=2", *offloaded]
    arms["ddp in bf16, EP 2"] = ["parallel.ep=2", BF16]
    for stage in STAGES[1:]:
        arms[f"ZeRO {stage} in bf16, EP 2"] = ["parallel.ep=2", BF16, *zero(stage)]
    for names in (list(arms)[first : first + 5] for first in range(0, len(arms), 5)):
        cases = {name: {"overrides": arms[name], "until": steps_of(name)} for name in names}
        launch(WORKER, str(work / "run.yaml"), str(work), json.dumps(cases))
    print(f"largest relative difference from ddp over {STEPS} steps (offloaded: {FEW}, bf16: 1)")
    print(f"{'':26}" + "".join(f"{kind:>12}" for kind in SHOWN) + f"{'clipped':>10}")
    for name in arms:
        if name.startswith("ddp"):
            continue
        ep = name.rpartition(", ")[2]
        is_bf16 = "bf16" in name
        expected = gathered_from(work, f"ddp in bf16, {ep}" if is_bf16 else f"ddp, {ep}", 2)
        found = gathered_from(work, name, 2)
        pairs = list(zip(found, expected, strict=False))[: 1 if is_bf16 else STEPS]
        assert len(pairs) == steps_of(name)
        rows = [differences(actual, wanted) for actual, wanted in pairs]
        clipped = sum(wanted["grad_norm"] > 0.3 for _, wanted in pairs)
        worst = "".join(f"{max(row[kind] for row in rows):12.1e}" for kind in SHOWN)
        print(f"{name:26}{worst}{clipped:>7}/{len(pairs)}", flush=True)


def steps_of(name: str) -> int:
    """Return the steps of an arm that are compared."""
    if "bf16" in name:
        return 1
    return FEW if "offloaded" in name else STEPS


def moved_runs(work: Path) -> None:
    """Let ddp, ZeRO and fsdp go on with each other's runs."""
    config = str(work / "run.yaml")
    common = ["train.steps=15", "optimizer.warmup_steps=99"]

    def job(name: str, *options: str) -> list[str]:
        return [*options, *common, f"run_dir={work}/{name}"]

    def forget(name: str, *steps: int) -> None:
        for step in steps:
            shutil.rmtree(work / name / f"checkpoints/step-{step:08d}")

    names = [f"moved{stage}" for stage in STAGES]
    whole = [job("whole"), *(job(f"all{stage}", *zero(stage)) for stage in STAGES)]
    launch(RUNS_WORKER, config, json.dumps([*whole, *map(job, names)]))
    for name in names:
        forget(name, 10, 15)
        shutil.copytree(work / name, work / f"re{name}")
    resaves = [job(f"removed{stage}", "resave", *zero(stage)) for stage in STAGES]
    second = [job(f"moved{stage}", *zero(stage), "parallel.ep=2") for stage in STAGES]
    launch(RUNS_WORKER, config, json.dumps([*resaves, *second]))
    for name in names:
        forget(name, 15)
    launch(RUNS_WORKER, config, json.dumps([job(name, "parallel.dense=fsdp") for name in names]))
    print("\n15 steps: 5 by ddp, 5 by ZeRO with EP 2, 5 by fsdp; or all by ZeRO")
    expected = saved(work / "whole", 15)
    for name in (*names, *(f"all{stage}" for stage in STAGES)):
        found = saved(work / name, 15)
        assert found.keys() == expected.keys()
        worst = max(
            float((found[k] - t).abs().max() / t.abs().max().clamp(min=1e-30))
            for k, t in expected.items()
        )
        kind = "moved through" if name.startswith("moved") else "all by"
        is_same = files(work, name) == files(work, "whole")
        same = "the same bytes as" if is_same else "other bytes than"
        print(f"{kind} ZeRO {name[-1]}: {worst:.1e} from ddp; its export has {same} ddp's")
    for stage in STAGES:
        name = f"removed{stage}"
        first, again = saved(work / name, 5), saved(work / name, 6)
        equal = first.keys() == again.keys() and all(
            torch.equal(again[key], tensor) for key, tensor in first.items()
        )
        found = files(work, name)
        forget(name, 6)
        same = found == files(work, name)
        print(f"a ddp checkpoint saved again by ZeRO {stage}: equal {equal}, exports equal {same}")


def saved(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    tensors = StoredTensors(run_dir / f"checkpoints/step-{step:08d}")
    return {key: t for key, t in tensors.items() if not key.startswith("rng/")}


def files(work: Path, name: str) -> dict[str, bytes]:
    """Return the files that ``moeyard export`` writes of a run."""
    out = work / "export"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "moeyard.cli", "export", str(work / name), str(out)]
    subprocess.run(command, check=True, capture_output=True)
    return {path.name: path.read_bytes() for path in out.iterdir()}


def own_clipping(work: Path) -> None:
    """Print what DeepSpeed's own layer and clipping do."""
    launch(CLIP_WORKER, str(work / "updates.json"))
    found = json.loads((work / "updates.json").read_text())
    print("\nDeepSpeed's own MoE layer and engine, ZeRO 0: norm of the gate's update in one step")
    for name in ("free", "clipped"):
        one, two = found[f"ep 1, {name}"], found[f"ep 2, {name}"]
        print(f"{name:8}EP 1 {one:.6f}   EP 2 {two:.6f}   {100 * (two / one - 1):+.1f} %")


if __name__ == "__main__":
    sys.exit(main())
