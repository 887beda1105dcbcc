"""``starts.jsonl``: time, machine and settings of each start of a run."""

import json
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import torch

from ... import __version__
from ...moe.models.model import Model
from ...parallel.dense.gradients import expert_parameter_names
from ...parallel.dense.local_part import whole_shape
from ...parallel.mesh import Mesh
from ..config import RunConfig
from ..device import device

STARTS = "starts.jsonl"
GIT_LIMIT_S = 10


def note_start(
    run_dir: Path, step: int, config: RunConfig, parameters: dict[str, int], mesh: Mesh
) -> None:
    """Append this start of the program, from ``step``, to ``starts.jsonl``.

    ``parameters`` are those of :func:`count_parameters`.
    """
    here = device()
    facts = {
        "step": step,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "ranks": mesh.world_size,
        "pp": mesh.pp_size,
        "ep": mesh.ep_size,
        "expert_tp": mesh.expert_tp_size,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(here) if here.type == "cuda" else "CPU",
        "precision": config.train.precision,
        **parameters,
        "moeyard": version_and_commit(),
        "torch": torch.__version__,
    }
    with (run_dir / STARTS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(facts) + "\n")


def count_parameters(decoder: Model, mesh: Mesh) -> dict[str, int]:
    """Return the parameters of the whole model, and those that one token uses.

    All ranks call it.
    """
    expert_names = expert_parameter_names(decoder)
    dense, experts, idle = 0, 0, 0
    for name, parameter in decoder.named_parameters():
        if name in expert_names:
            # Each slice of the inner width comes with the whole of this bias, but only one trains.
            slices = 1 if name.endswith("fc2_bias") else mesh.expert_tp_size
            experts += parameter.numel() * mesh.ep_size * slices
        elif decoder.stage.start == 0 or name != "embed_tokens.weight":  # tied: in two stages
            shape = whole_shape(parameter)
            dense += shape.numel()
            if ".lora_experts." in name:  # a token goes through one of them
                idle += shape.numel() - shape.numel() // shape[0]
    stages = mesh.of_all_stages([(dense, experts)])
    dense, experts = (sum(parts) for parts in zip(*stages, strict=True))
    moe = decoder.config.moe
    active = experts * moe.router.k // moe.num_experts if moe is not None else 0
    return {"parameters": dense + experts, "active_parameters": dense - idle + active}


def version_and_commit() -> str:
    """Return the version and, in a git checkout, the commit: ``0.1.0 (1a2b3c4)``."""
    root = Path(__file__).parent.parent.parent
    if not (root / ".git").exists() or shutil.which("git") is None:
        return __version__
    command = ["git", "-C", str(root), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=GIT_LIMIT_S
        )
    except subprocess.TimeoutExpired:  # a network file system that hangs
        return __version__
    return f"{__version__} ({done.stdout.strip()})" if done.returncode == 0 else __version__
