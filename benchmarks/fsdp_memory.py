"""How much memory does a rank use under parallel.dense = ddp and fsdp?

    python benchmarks/fsdp_memory.py

Trains two steps on 2 and 4 ranks, in fp32 and bf16, experts split over all ranks. Adds up the
storages a rank keeps between steps (parameters, masters, main gradients, moments) for the dense
part (routers included) and for the experts. Also reads from the kernel how far the resident memory
grew since before the model was built: between steps, and at the peak of the second step. glibc is
told to return freed tensors immediately, so that all resident memory is in use. Reports the rank
that holds most. Linux with glibc only; about five minutes on two cores.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import yaml

from moeyard.configuration import validate_config
from moeyard.moe.models.decoder import Decoder
from moeyard.parallel.dense.gradients import expert_parameter_names
from moeyard.parallel.dense.local_part import local_part
from moeyard.parallel.mesh import build_mesh
from moeyard.parallel.process import process_group
from moeyard.training.config import RunConfig
from moeyard.training.objectives.next_token import NextTokenObjective
from moeyard.training.parallelize import parallelize
from moeyard.training.setup import build_model, fill_vocabulary
from moeyard.training.step import TrainStep

from report import write_results

MIB = 1 << 20
MODEL = {
    "d_model": 768,
    "num_layers": 8,
    "num_heads": 12,
    "max_positions": 64,
    "moe": {"num_experts": 8, "d_expert": 256, "d_shared": 1024},
}
TRAIN = {"steps": 2, "sequence_length": 64, "batch_sequences": 4}


def bytes_kept(step: TrainStep, decoder: Decoder) -> dict[str, int]:
    """Add up every storage once, separately for experts and the rest."""
    experts = expert_parameter_names(decoder)
    tensors = [(name in experts, local_part(p)) for name, p in decoder.named_parameters()]
    tensors += [(name in experts, p.main_grad) for name, p in decoder.named_parameters()]
    for key, tensor in step.optimizer.named_tensors():
        tensors.append((".experts." in key, local_part(tensor)))
    sizes: dict[bool, dict[int, int]] = {False: {}, True: {}}
    for is_expert, tensor in tensors:
        storage = tensor.untyped_storage()
        sizes[is_expert][storage.data_ptr()] = storage.nbytes()
    return {"dense": sum(sizes[False].values()), "experts": sum(sizes[True].values())}


def resident(field: str) -> int:
    """Read VmRSS or its peak VmHWM."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"{field} is not in /proc/self/status")


def work(config_path: Path, out: Path) -> None:
    """Run one rank and write its figures to ``out``."""
    with process_group(120) as watch:
        config = validate_config(RunConfig, yaml.safe_load(config_path.read_text()))
        assert config.model.moe is not None
        mesh = build_mesh(config.parallel.ep, config.model.moe.num_experts, watch, 120)
        data = NextTokenObjective.open_data(config, out / "data", mesh)
        before = resident("VmRSS")
        decoder = build_model(config, fill_vocabulary(config, data.tokenizer), data, mesh)
        objective = NextTokenObjective(config, data)
        loss, rows = objective.module(decoder), objective.mean_rows
        parallel = parallelize(config, decoder, loss, mesh, rows)
        step = TrainStep(config, decoder, objective, parallel, mesh)
        del parallel
        step.run(0, stop_requested=False)
        between = resident("VmRSS") - before
        Path("/proc/self/clear_refs").write_text("5")  # start a new peak
        step.run(1, stop_requested=False)
        figures = {
            **bytes_kept(step, decoder),
            "resident": between,
            "peak": resident("VmHWM") - before,
        }
        (out / f"{mesh.rank}.json").write_text(json.dumps(figures))


def measure(ranks: int, precision: str, dense: str) -> dict[str, int]:
    """Return the largest figures of all ranks of one launch."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        (out / "text.txt").write_text("def f(x):\n    return x\n" * 1000)
        values = {
            "run_dir": str(out / "run"),
            "model": MODEL,
            "data": {"source": str(out / "text.txt")},
            "train": {**TRAIN, "precision": precision},
            "parallel": {"ep": ranks, "dense": dense},
        }
        (out / "config.yaml").write_text(yaml.safe_dump(values))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(ranks), __file__, "work", str(out / "config.yaml")]
        environment = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
        subprocess.run([*command, str(out)], env={**os.environ, **environment}, check=True)
        figures = [json.loads((out / f"{rank}.json").read_text()) for rank in range(ranks)]
    return {key: max(f[key] for f in figures) for key in figures[0]}


def main() -> None:
    table = []
    print("MiB of the rank that holds most")
    for ranks in (2, 4):
        for precision in ("fp32", "bf16"):
            for dense in ("ddp", "fsdp"):
                figures = {
                    k: round(v / MIB, 1) for k, v in measure(ranks, precision, dense).items()
                }
                row = {"ranks": ranks, "precision": precision, "parallel.dense": dense, **figures}
                table.append(row)
                print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    with torch.device("meta"):
        decoder = Decoder(validate_config(RunConfig, MINIMAL).model)
    experts = expert_parameter_names(decoder)
    counts = {False: 0, True: 0}
    for name, parameter in decoder.named_parameters():
        counts[name in experts] += parameter.numel()
    print(f"parameters: {counts[False]} dense, {counts[True]} in experts")
    path = write_results(
        "fsdp_memory",
        {
            "question": "what does a rank hold under parallel.dense = ddp and fsdp",
            "unit": "MiB of the rank that holds most",
            "dense_parameters": counts[False],
            "expert_parameters": counts[True],
            "table": table,
        },
    )
    print(f"written to {path}")


MINIMAL = {"run_dir": "unset", "model": {**MODEL, "vocab_size": 257}, "train": TRAIN}

if __name__ == "__main__":
    if sys.argv[1:2] == ["work"]:
        work(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main()
