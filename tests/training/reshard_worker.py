"""One rank of the resharding matrix: open a checkpoint on this mesh and save it again.

    torchrun ... reshard_worker.py CONFIG SOURCE OUT [NAME=OVERRIDES ...]

For each NAME the run in SOURCE is resumed with the comma-separated overrides, and its state is
saved in OUT/NAME before any step.
"""

import sys
from pathlib import Path

from moeyard.parallel.mesh import build_mesh
from moeyard.parallel.process import process_group
from moeyard.training.checkpoints.checkpoint import Checkpoints
from moeyard.training.read_config import read_run_config
from moeyard.training.trainer import Trainer


def main() -> None:
    config_path, source, out = (Path(argument) for argument in sys.argv[1:4])
    with process_group(60) as watch:
        for case in sys.argv[4:]:
            name, _, overrides = case.partition("=")
            options = [f"run_dir={source}", *filter(None, overrides.split(","))]
            config = read_run_config(config_path, options)
            parallel = config.parallel
            experts = config.model.moe.num_experts
            mesh = build_mesh(parallel.ep, experts, watch, 60, pp=parallel.pp)
            trainer = Trainer(config, source, mesh)
            done = trainer.saves.resume()
            trainer.saves.checkpoints = Checkpoints(out / name, mesh, keep=1)
            (out / name).mkdir(parents=True, exist_ok=True)
            mesh.barrier()
            trainer.saves.save(done, must=True)


if __name__ == "__main__":
    main()
