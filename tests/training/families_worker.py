"""One rank of the tests that start from folders: train a step that changes nothing, and save.

    torchrun ... families_worker.py CONFIG RUNS FOLDER [FOLDER ...]

Each folder's run is RUNS/NAME. Rank 0 prints its held-out loss.
"""

import sys
from pathlib import Path

from moeyard.parallel.mesh import build_mesh
from moeyard.parallel.process import process_group
from moeyard.training.read_config import read_run_config
from moeyard.training.trainer import Trainer

STILL = ["train.steps=1", "optimizer.lr=1e-30", "optimizer.weight_decay=0", "model=null"]


def main() -> None:
    config_path, runs, folders = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    with process_group(60) as watch:
        for folder in folders:
            run_dir = runs / Path(folder).name
            options = [*STILL, f"run_dir={run_dir}", f"start_from={folder}"]
            config = read_run_config(config_path, options)
            has_experts = config.model.moe is not None
            if has_experts and watch is not None:
                config = read_run_config(config_path, [*options, "parallel.ep=2"])
            num_experts = config.model.moe.num_experts if has_experts else 1
            mesh = build_mesh(config.parallel.ep, num_experts, watch, 60)
            run_dir.mkdir(parents=True, exist_ok=True)
            Trainer(config, run_dir, mesh).run()


if __name__ == "__main__":
    main()
