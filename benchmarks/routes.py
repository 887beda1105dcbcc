"""What does it cost to record routes, and does a replay give the same numbers?

    python benchmarks/routes.py

1. A training step with monitor.routes={} (every step, ids and weights) against the same step
   without, in one process, step by step in turns. CPU time on one thread, median of the ratios of
   neighbouring steps. Next to it the share of the step that the recording itself takes: looking at
   the forward, making rows, packing and writing them. Sizes: 512 tokens of a very small model,
   configs/train/tiny.yaml, and 64 fine-grained experts of which a token visits 8.
2. Bytes for each token.
3. A run of 5 steps replayed from its own file: largest difference of losses, gradient norms and
   final weights, fp32, with recompute.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
import yaml

from moeyard.moe.routes.reader import read_routes
from moeyard.parallel.mesh import Mesh
from moeyard.training.read_config import read_run_config
from moeyard.training.routes import RouteRecording, replaying_steps
from moeyard.training.trainer import Trainer

from report import write_results

SIZES = {
    "512": {"d_model": 64, "layers": 2, "experts": 4, "k": 2, "d_expert": 64, "tokens": 512},
    "tiny": {"d_model": 128, "layers": 4, "experts": 8, "k": 2, "d_expert": 256, "tokens": 4096},
    "fine": {"d_model": 256, "layers": 6, "experts": 64, "k": 8, "d_expert": 64, "tokens": 2048},
}
ROUNDS = {"512": 200, "tiny": 20, "fine": 16}


def config_of(size: str, folder: Path, *options: str):
    values = SIZES[size]
    text = folder / "text.txt"
    if not text.exists():
        source = Path(__file__).parent.parent
        text.write_text("".join(p.read_text() for p in sorted((source / "moe").rglob("*.py"))))
    config = {
        "run_dir": str(folder / "run"),
        "model": {
            "d_model": values["d_model"],
            "num_layers": values["layers"],
            "num_heads": 4,
            "max_positions": 256,
            "moe": {
                "num_experts": values["experts"],
                "d_expert": values["d_expert"],
                "router": {"kind": "topk", "k": values["k"]},
            },
        },
        "data": {"source": str(text)},
        "train": {
            "steps": 100_000,
            "sequence_length": 256,
            "batch_sequences": values["tokens"] // 256,
        },
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return read_run_config(path, list(options))


class Timed(RouteRecording):
    """Adds up the CPU seconds that recording takes."""

    seconds = 0.0

    def _expect(self, step, windows):
        self._count(super()._expect, step, windows)

    def _see(self, batch, routings):
        self._count(super()._see, batch, routings)

    def step(self, done, result, phase_seconds):
        self._count(super().step, done, result, phase_seconds)

    def _count(self, work, *arguments):
        started = time.process_time()
        work(*arguments)
        self.seconds += time.process_time() - started


def cost(size: str) -> dict:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = config_of(size, folder, "monitor.routes={}")
        trainers = []
        for run in ("plain", "recorded"):
            (folder / run).mkdir()
            trainers.append(Trainer(config, folder / run, Mesh()))
        plain, recorded = trainers
        recording = Timed(
            recorded.objective, recorded.decoder, recorded._step, folder / "recorded", Mesh(), 0
        )
        ratios, seconds = [], []

        def run_plain(step: int) -> None:
            plain._step.run(step, False)

        def run_recorded(step: int) -> None:
            recording.step(step + 1, recorded._step.run(step, False), {})

        works = (run_plain, run_recorded)
        for step in range(ROUNDS[size] + 3):
            took = [0.0, 0.0]
            for index in (0, 1) if step % 2 else (1, 0):
                started = time.process_time()
                works[index](step)
                took[index] = time.process_time() - started
            if step == 2:
                recording.seconds = 0.0
            if step > 2:  # the first ones warm up
                seconds.append(took[1])
                ratios.append(took[1] / took[0])
        share = recording.seconds / sum(seconds)
        recording.close()
        tokens = SIZES[size]["tokens"] * (ROUNDS[size] + 3)
        return {
            "step_ms": 1e3 * statistics.median(seconds),
            "ratio": statistics.median(ratios),
            "share_of_recording": share,
            "recording_ms": 1e3 * recording.seconds / len(seconds),
            "bytes_per_token": recording._writer.num_bytes / tokens,
        }


def replayed() -> dict:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options = ["train.steps=5", "train.log_every=1", "train.recompute=true"]
        runs = {}
        for run in ("recorded", "replayed"):
            (folder / run).mkdir()
            more = ["monitor.routes={}"] if run == "recorded" else []
            trainer = Trainer(config_of("512", folder, *options, *more), folder / run, Mesh())
            if run == "recorded":
                trainer.run()
            else:
                routes = read_routes(folder / "recorded/routes")
                step = (trainer._step, trainer.decoder, trainer.objective)
                with replaying_steps(*step, routes):
                    trainer.run()
            lines = (folder / run / "metrics.jsonl").read_text().splitlines()
            runs[run] = trainer, [json.loads(line) for line in lines]
        (first, a), (second, b) = runs.values()
        differences = {
            key: max(abs(x[key] - y[key]) for x, y in zip(a, b, strict=True))
            for key in ("loss", "balance", "z", "grad_norm")
        }
        pairs = zip(first.decoder.parameters(), second.decoder.parameters(), strict=True)
        differences["weights"] = max(float((x - y).detach().abs().max()) for x, y in pairs)
        return differences


def main() -> None:
    torch.set_num_threads(1)
    table = {}
    for size in SIZES:
        found = table[size] = cost(size)
        print(
            f"{size:6} step {found['step_ms']:8.1f} ms  with recording {found['ratio']:.4f}  "
            f"recording itself {found['recording_ms']:.2f} ms = {found['share_of_recording']:.2%}  "
            f"{found['bytes_per_token']:.0f} bytes per token",
            flush=True,
        )
    differences = replayed()
    print("replayed run, largest differences:", differences)
    path = write_results("routes", {"sizes": SIZES, "cost": table, "replay": differences})
    print(f"written to {path}")


if __name__ == "__main__":
    main()
