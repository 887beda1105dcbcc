"""Train on all GPUs of this machine in every way, and compare with one CPU process.

    python benchmarks/gpu_ranks.py --out FOLDER             # on 1 to 8 GPUs
    python benchmarks/gpu_ranks.py --out FOLDER --cpu 2     # the same on 2 CPU processes with gloo

Arms, in this order: one GPU; then 2, 4 and 8 of them as far as there are so many: EP of each
divisor, dense parameters whole and sharded, recomputed layers, accumulation, every path of rows,
copies, slices of experts, low-rank updates. Then runs that go on with other ranks, and on a CPU; an
export with experts in 8 and 4 bits that generates; and a rank that is killed. Each line says what
was compared and how far it is off. Exits with 1 if an arm fails.

It needs no network and no installed moeyard: the folder above the repository's name on PYTHONPATH
is enough, as gpu.sh sets it.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

WORKER = Path(__file__).with_name("gpu_ranks_worker.py")
STEPS = 6
LIMITS = {"plain": 1e-4, "capacity": 1e-4, "lora": 1e-4, "shared": 1e-4, "bf16": 2e-2}
"""Largest relative error of a step's loss; the norm of gradients may be off ten times as far."""
KINDS = {
    "plain": [],
    "bf16": ["train.precision=bf16"],
    "capacity": ["model.moe.router={kind: topk, k: 2, capacity: {factor: 1.0}}"],
    "lora": ["train.parameters=lora"],
    "shared": ["model.moe.d_shared=32"],
}
"""What one CPU process computes."""
CONFIG = """
seed: 3
run_dir: unset
model:
  {d_model: 64, num_layers: 2, num_heads: 4, num_kv_heads: 2, max_positions: 256,
    moe: {num_experts: 8, d_expert: 64,
      router: {kind: topk, k: 2, balance_loss: 0.01, z_loss: 0.001}}}
data: {tokenizer: bytes, source: TEXT}
train: {steps: 6, sequence_length: 64, batch_sequences: 16, log_every: 1, eval_sequences: 16}
optimizer: {lr: 0.003, warmup_steps: 2}
checkpoint: {every: 3, keep: 9}
parallel: {timeout_s: 90}
"""
TEXT = "".join(
    f"def function_{n}(a, b={n % 7}):\n    return [a * {n}, b ** {n % 5}, '{'xyz' * (n % 4)}']\n"
    for n in range(600)
)
LAUNCH_S = 420
KILLED_S = 60
"""A rank that ends must end the others within this time."""


@dataclass(frozen=True)
class Arm:
    """A run and what it should compute."""

    name: str
    kind: str
    overrides: list[str]


def arms_of(world: int) -> Iterator[Arm]:
    """Yield the arms for a number of ranks, simple ones first."""
    recomputed = {"layers": "true", "experts": "experts"}
    for kind in ("plain", "bf16"):
        for what, value in recomputed.items():
            yield Arm(f"{kind}, recomputed {what}", kind, [f"train.recompute={value}"])
    if world == 1:
        yield Arm("plain", "plain", [])
        yield Arm("low-rank updates", "lora", [])
        return
    for ep in (ep for ep in (1, 2, 4, 8) if world % ep == 0):
        for dense in ("ddp", "fsdp"):
            options = [f"parallel.ep={ep}", f"parallel.dense={dense}"]
            yield Arm(f"ep {ep}, {dense}", "plain", options)
    whole = [f"parallel.ep={world}"]
    both = [*whole, "parallel.dense=fsdp", "train.recompute=true", "train.accumulation=2"]
    yield Arm("fsdp, recomputed layers, 2 micro-batches", "bf16", both)
    yield Arm("all_gather", "plain", [*whole, "parallel.path=all_gather"])
    chunks = ["parallel.chunks=4", "parallel.backward_chunks=2"]
    yield Arm("in chunks, next to a shared expert", "shared", [*whole, *chunks])
    yield Arm("chunks auto", "plain", [*whole, "parallel.chunks=auto"])
    yield Arm("padded", "capacity", [*whole, "parallel.path=padded"])
    yield Arm("copies", "plain", [*whole, "parallel.copies={experts: 2, when: always}"])
    yield Arm("low-rank updates", "lora", whole)
    slices = [f"parallel.ep={world // 2}", "parallel.expert_tp=2", "parallel.chunks=2"]
    yield Arm("slices of experts", "plain", slices)
    if world >= 4:
        nodes = ["parallel.path=hierarchical", "parallel.ranks_per_node=2", *chunks]
        yield Arm("hierarchical, in chunks", "plain", [*whole, *nodes])


class Bench:
    """Runs arms, compares them, and keeps a line for each."""

    def __init__(self, out: Path, ranks: int, on_cpu: bool) -> None:
        self.out, self.ranks, self.on_cpu = out, ranks, on_cpu
        self.failed = 0
        self.config = out / "config.yaml"
        (out / "text.txt").write_text(TEXT)
        self.config.write_text(CONFIG.replace("TEXT", str(out / "text.txt")))
        self._lines = (out / "ranks.txt").open("w")

    def say(self, line: str, failed: bool = False) -> None:
        """Print a line and keep it."""
        line = f"{'FAILED' if failed else 'ok':6} {line}"
        self.failed += failed
        for file in (sys.stdout, self._lines):
            file.write(f"{line}\n")
            file.flush()

    def environment(self, on_cpu: bool) -> dict[str, str]:
        """Return what a process sees: this machine's GPUs, or none."""
        more = {"OMP_NUM_THREADS": "1"} | ({"CUDA_VISIBLE_DEVICES": ""} if on_cpu else {})
        return {**os.environ, **more}

    def launch(self, ranks: int, jobs: list[list[str]], on_cpu: bool, label: str) -> bool:
        """Train all jobs in one launch; say whether it ended well."""
        listed = self.out / f"{label}.json"
        listed.write_text(json.dumps(jobs))
        command = [sys.executable]
        if ranks > 1:
            command += ["-m", "torch.distributed.run", "--standalone"]
            command += ["--nproc-per-node", str(ranks)]
        command += [str(WORKER), str(self.config), str(listed)]
        command += ["--apart"] if self.on_cpu and ranks > 1 else []
        with (self.out / f"{label}.log").open("w") as log:
            try:
                done = subprocess.run(
                    command,
                    env=self.environment(on_cpu),
                    stdout=log,
                    stderr=log,
                    check=False,
                    timeout=LAUNCH_S,
                )
            except subprocess.TimeoutExpired:
                self.say(f"{label}: not done after {LAUNCH_S} s, see {label}.log", failed=True)
                return False
        if done.returncode != 0:
            self.say(f"{label}: exit status {done.returncode}, see {label}.log", failed=True)
        return done.returncode == 0

    def run_dir(self, world: int, arm: Arm) -> Path:
        """Return the folder of an arm's run."""
        return self.out / f"{world}-ranks" / arm.name.replace(" ", "-").replace(",", "")

    def job(self, run_dir: Path, arm: Arm) -> list[str]:
        """Return the overrides of an arm's run."""
        return [*KINDS[arm.kind], *arm.overrides, f"run_dir={run_dir}"]

    def references(self) -> None:
        """Compute every kind in one CPU process."""
        jobs = [[*o, f"run_dir={self.out}/reference/{kind}"] for kind, o in KINDS.items()]
        self.launch(1, jobs, True, "reference")

    def train(self, world: int, arms: Sequence[Arm], label: str) -> None:
        """Train and compare; after a failure, the arms that are left get launches of their own."""
        jobs = [self.job(self.run_dir(world, arm), arm) for arm in arms]
        if not self.launch(world, jobs, self.on_cpu, label):
            for number, (arm, job) in enumerate(zip(arms, jobs, strict=True)):
                if len(self.records(self.run_dir(world, arm))) < STEPS:
                    self.launch(world, [job], self.on_cpu, f"{label}-alone-{number}")
        for arm in arms:
            self.compare(self.run_dir(world, arm), arm, f"{label}: {arm.name}")

    def records(self, run_dir: Path) -> list[dict]:
        """Return the records of a run so far."""
        file = run_dir / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def compare(self, run_dir: Path, arm: Arm, label: str) -> None:
        """Say how far losses and norms of a run are from those of one CPU process."""
        found = self.records(run_dir)
        expected = self.records(self.out / "reference" / arm.kind)
        if len(found) != STEPS or len(expected) != STEPS:
            self.say(f"{label}: {len(found)} of {STEPS} steps", failed=True)
            return
        errors = {
            name: max(abs(a[name] / b[name] - 1) for a, b in zip(found, expected, strict=True))
            for name in ("loss", "grad_norm")
        }
        limit = LIMITS[arm.kind]
        is_far = errors["loss"] > limit or errors["grad_norm"] > 10 * limit
        memory = ""
        if not self.on_cpu and (run_dir / "memory.json").exists():
            used = json.loads((run_dir / "memory.json").read_text())
            memory = f", at most {used / 1e6:.0f} MB of a GPU"
        self.say(
            f"{label}: loss within {errors['loss']:.0e}, norm within {errors['grad_norm']:.0e} of "
            f"{arm.kind} on a CPU{memory}",
            failed=is_far,
        )

    def resume(self, world: int, arms: Sequence[Arm]) -> None:
        """Let runs go on from their middle with other ranks, and on a CPU."""
        by_name = {arm.name: arm for arm in arms}
        moves = {f"ep {world}, ddp": "ep 1, fsdp", "ep 1, fsdp": f"ep {world}, ddp"}
        jobs, moved = [], []
        for old, new in moves.items():
            copy = self._half(self.run_dir(world, by_name[old]))
            arm = Arm(f"{old} goes on as {new}", "plain", by_name[new].overrides)
            jobs.append(self.job(copy, arm))
            moved.append((copy, arm))
        self.launch(world, jobs, self.on_cpu, f"{world}-ranks-resumed")
        for copy, arm in moved:
            self.compare(copy, arm, f"{world} ranks: {arm.name}")
        copy = self._half(self.run_dir(world, by_name[f"ep {world}, ddp"]))
        arm = Arm(f"ep {world}, ddp goes on in one CPU process", "plain", [])
        self.launch(1, [self.job(copy, arm)], True, f"{world}-ranks-on-a-cpu")
        self.compare(copy, arm, f"{world} ranks: {arm.name}")

    def _half(self, run_dir: Path) -> Path:
        """Copy a run as it was after half of its steps."""
        copies = list(run_dir.parent.glob(f"{run_dir.name}-half-*"))
        copy = run_dir.with_name(f"{run_dir.name}-half-{len(copies)}")
        if run_dir.exists():
            shutil.copytree(run_dir, copy)
            shutil.rmtree(copy / "checkpoints" / f"step-{STEPS:08d}", ignore_errors=True)
        return copy

    def serve(self, run_dir: Path) -> None:
        """Export a run, convert its experts to few bits, and generate with both on a device."""
        model = self.out / "model"
        command = [sys.executable, "-m", "moeyard.cli"]
        steps = [[*command, "export", str(run_dir), str(model)]]
        for bits in ("int8", "int4"):
            target = self.out / f"model-{bits}"
            steps.append([*command, "convert", str(model), str(target), f"--dtype={bits}"])
        for name in ("model", "model-int8", "model-int4"):
            device = "cpu" if self.on_cpu else "cuda"
            steps.append([sys.executable, "-c", GENERATE, str(self.out / name), device])
        for step in steps:
            shown = " ".join(Path(part).name for part in step[-3:] if part != GENERATE)
            done = subprocess.run(
                step,
                env=self.environment(self.on_cpu),
                capture_output=True,
                text=True,
                check=False,
                timeout=LAUNCH_S,
            )
            last = (done.stdout + done.stderr).strip().splitlines()[-1:]
            self.say(f"export: {shown}: {' '.join(last)}", failed=done.returncode != 0)

    def kill(self, world: int) -> None:
        """Kill a rank that trains; the others must end soon, and its number must be said."""
        run_dir, log_file = self.out / "killed", self.out / "killed.log"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(world), "-m", "moeyard.training", str(self.config)]
        command += [f"run_dir={run_dir}", "train.steps=100000", f"parallel.ep={world}"]
        with log_file.open("w") as log:
            agent = subprocess.Popen(
                command, env=self.environment(self.on_cpu), stdout=log, stderr=log
            )
            deadline = time.monotonic() + LAUNCH_S
            while len(self.records(run_dir)) < 3 and time.monotonic() < deadline:
                if agent.poll() is not None:
                    break
                time.sleep(0.2)
            victim = self._process_of(agent.pid, world - 1)
            if victim is not None:
                os.kill(victim, signal.SIGKILL)
            began = time.monotonic()
            try:
                status = agent.wait(timeout=KILLED_S)
            except subprocess.TimeoutExpired:
                agent.kill()
                status = None
        is_named = f"rank {world - 1}" in log_file.read_text()
        self.say(
            f"{world} ranks: killed rank {world - 1} (process {victim}): torchrun ended with "
            f"{status} after {time.monotonic() - began:.0f} s, rank named: {is_named}",
            failed=victim is None or status in (None, 0) or not is_named,
        )

    def _process_of(self, agent: int, rank: int) -> int | None:
        children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
        for pid in children:
            if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                return int(pid)
        return None


GENERATE = """
import sys, torch, moeyard
ids = torch.arange(40).view(2, 20) % 90
model = moeyard.load(sys.argv[1], device=sys.argv[2])
found = model(ids.to(sys.argv[2])).float().cpu()
expected = moeyard.load(sys.argv[1])(ids).float()
error = float((found - expected).abs().max() / expected.abs().max())
new = model.generate(ids.to(sys.argv[2]), max_new_tokens=16, temperature=0)
print(f"logits within {error:.0e} of a CPU's, generated {tuple(new.shape)}")
sys.exit(error > 1e-3)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for runs and logs")
    parser.add_argument("--cpu", type=int, metavar="N", help="N CPU processes instead of GPUs")
    arguments = parser.parse_args()
    ranks = arguments.cpu or torch.cuda.device_count()
    if ranks < 1:
        parser.error("there is no GPU here; try --cpu 2")
    shutil.rmtree(arguments.out, ignore_errors=True)
    arguments.out.mkdir(parents=True)
    bench = Bench(arguments.out.resolve(), ranks, arguments.cpu is not None)
    bench.references()
    for world in (w for w in (1, 2, 4, 8) if w <= ranks):
        arms = list(arms_of(world))
        bench.train(world, arms, f"{world} ranks" if world > 1 else "1 rank")
        if world > 1:
            bench.resume(world, arms)
            bench.kill(world)
    bench.serve(bench.run_dir(1, Arm("plain", "plain", [])))
    print(f"{bench.failed} failed; see {arguments.out}/ranks.txt")
    return 1 if bench.failed else 0


if __name__ == "__main__":
    sys.exit(main())
