"""One rank of gpu_ranks.py: trains several runs, one after the other, in one launch.

    torchrun ... gpu_ranks_worker.py CONFIG JOBS_JSON [--apart]

JOBS_JSON is a file with a list of jobs, each a list of overrides as ``python -m moeyard.training``
takes them. Rank 0 writes RUN_DIR/memory.json with the most memory of a GPU that any rank used, in
bytes. ``--apart`` keeps ranks from sharing memory, as if each were on a host of its own.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from moeyard.parallel.mesh import build_mesh
from moeyard.parallel.process import process_group
from moeyard.parallel.watch.watch import Watch
from moeyard.training.read_config import read_run_config
from moeyard.training.run.agreement import check_same_start
from moeyard.training.run.folder import create_run_folder
from moeyard.training.trainer import Trainer

HOSTS = ("dp_host", "ep_host", "edp_host", "expert_tp_host")
TIMEOUT_S = 90.0


def run_job(config_path: Path, job: list[str], watch: Watch | None, is_apart: bool) -> None:
    """Train one run to its end."""
    config = read_run_config(config_path, job)
    check_same_start(config, watch)
    ep, expert_tp = config.parallel.ep, config.parallel.expert_tp
    assert config.model.moe is not None
    num_experts = config.model.moe.num_experts
    mesh = build_mesh(ep, num_experts, watch, TIMEOUT_S, expert_tp=expert_tp)
    if is_apart:
        mesh = replace(mesh, **dict.fromkeys(HOSTS))
    run_dir = Path(config.run_dir)
    mesh.on_rank_0(lambda: create_run_folder(run_dir))
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    Trainer(config, run_dir, mesh).run()
    used = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    most = int(mesh.largest(torch.tensor([used])))
    if mesh.rank == 0:
        (run_dir / "memory.json").write_text(json.dumps(most))


def main() -> None:
    config_path, jobs = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    with process_group(TIMEOUT_S) as watch:
        for job in jobs:
            run_job(config_path, job, watch, "--apart" in sys.argv)


if __name__ == "__main__":
    main()
