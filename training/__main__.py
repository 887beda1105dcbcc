"""The training program: python -m moeyard.training CONFIG [a.b=c ...], alone or under torchrun."""

import argparse
import logging
import os
import sys
from pathlib import Path

from ..configuration import load_config
from ..errors import MoeyardError
from ..parallel.mesh import build_mesh
from ..parallel.process import (
    die_with_parent,
    is_torchrun_worker,
    start_process_group,
    stop_process_group,
)
from .allocator import keep_freed_memory
from .config import RunConfig
from .run_folder import create_run_folder, dump_config
from .trainer import Trainer


def main(argv: list[str] | None = None) -> int:
    """Run the program and return its exit status: 0 done or stopped, 1 failed, 2 bad input."""
    parser = argparse.ArgumentParser(prog="python -m moeyard.training", description=__doc__)
    parser.add_argument("config", type=Path, help="YAML configuration")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="values to change")
    parser.add_argument("--print-config", action="store_true", help="print the result and stop")
    arguments = parser.parse_args(argv)
    rank = int(os.environ.get("RANK", "0"))
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        config = load_config(RunConfig, arguments.config, arguments.overrides)
        if arguments.print_config:
            sys.stdout.write(dump_config(config))
            return 0
        train(config)
    except MoeyardError as error:
        if rank == 0:
            sys.stderr.write(f"error: {error}\n")
        return 2 if isinstance(error, ValueError) else 1
    return 0


def train(config: RunConfig) -> None:
    """Run one training process to its end."""
    keep_freed_memory()
    if is_torchrun_worker():
        die_with_parent()
        start_process_group(config.parallel.timeout_s)
    try:
        num_experts = config.model.moe.num_experts if config.model.moe is not None else 1
        mesh = build_mesh(config.parallel.ep, num_experts)
        run_dir = Path(config.run_dir)
        if mesh.rank == 0:
            create_run_folder(config)
        mesh.barrier()
        Trainer(config, run_dir, mesh).run()
    finally:
        stop_process_group()


if __name__ == "__main__":
    sys.exit(main())
