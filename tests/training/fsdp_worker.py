"""One rank of the tests of sharded runs: several runs, one after the other, in one launch.

    torchrun ... fsdp_worker.py CONFIG JOBS_JSON

A job is a list of overrides, as ``python -m moeyard.training`` takes them, that trains and notes
in RUN_DIR/rank-RANK.json how many weights the rank holds in the end and how often the head was
reduced. One that begins with ``resave`` loads the newest checkpoint and saves it as the next step.
"""

import json
import sys
from pathlib import Path

from moeyard.parallel.dense.local_part import local_part
from moeyard.parallel.mesh import build_mesh
from moeyard.parallel.process import process_group
from moeyard.training.read_config import read_run_config
from moeyard.training.run.folder import create_run_folder
from moeyard.training.trainer import Trainer


def run_job(config_path: Path, job: list[str], watch) -> None:
    resaves, overrides = job[0] == "resave", [part for part in job if part != "resave"]
    config = read_run_config(config_path, overrides)
    num_experts = config.model.moe.num_experts if config.model.moe is not None else 1
    mesh = build_mesh(config.parallel.ep, num_experts, watch, 60)
    run_dir = Path(config.run_dir)
    mesh.on_rank_0(lambda: create_run_folder(run_dir))
    trainer = Trainer(config, run_dir, mesh)
    if resaves:
        done = trainer.saves.resume()
        assert done, "there was nothing to load"
        trainer.saves.save(done + 1, must=True)
    else:
        reductions: list[int] = []
        head = trainer.decoder.lm_head.weight
        head.register_post_accumulate_grad_hook(lambda _: reductions.append(1))
        trainer.run()
        held = sum(local_part(p).numel() for p in trainer.decoder.parameters())
        noted = {"held": held, "reductions": len(reductions)}
        (run_dir / f"rank-{mesh.rank}.json").write_text(json.dumps(noted))


def main() -> None:
    config_path, jobs = Path(sys.argv[1]), json.loads(sys.argv[2])
    with process_group(60) as watch:
        for job in jobs:
            run_job(config_path, job, watch)


if __name__ == "__main__":
    main()
