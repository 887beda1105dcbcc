"""The training program: python -m moeyard.training CONFIG [a.b=c ...], alone or under torchrun."""

# First: torchrun may die during the imports below, which take seconds and which Windows lacks.
from ..parallel.parent import die_with_parent, is_torchrun_worker
from ..system import stop_unless_it_can_run

if __name__ == "__main__":
    stop_unless_it_can_run()
    if is_torchrun_worker():
        die_with_parent()

import argparse
import logging
import os
import sys
from pathlib import Path

from ..errors import MoeyardError, Stopped
from ..moe.routers.own_code import allow
from ..parallel.mesh import build_mesh
from ..parallel.process import process_group
from ..parallel.watch.last_word import say_last
from .config import RunConfig
from .read_config import read_run_config
from .run.agreement import check_same_start
from .run.allocator import keep_freed_memory
from .run.folder import claim_run_folder, dump_config
from .run.shared_folder import check_shared_folder
from .stop import StopRequest
from .trainer import Trainer

INTERRUPTED = 130


def main(argv: list[str] | None = None) -> int:
    """Run the program and return its exit status: 0 done or stopped, 1 failed, 2 bad input."""
    parser = argparse.ArgumentParser(prog="python -m moeyard.training", description=__doc__)
    parser.add_argument("config", type=Path, help="YAML configuration")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="values to change")
    parser.add_argument(
        "--print-config", action="store_true", help="print the final configuration and stop"
    )
    parser.add_argument(
        "--allow-code",
        action="append",
        default=[],
        metavar="MODULE",
        help="permit and import your own module with routers; repeat for several modules",
    )
    arguments = parser.parse_intermixed_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        allow(arguments.allow_code)
        config = read_run_config(arguments.config, arguments.overrides)
        if arguments.print_config:
            sys.stdout.write(dump_config(config))
            return 0
        train(config)
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            sys.stderr.write(f"{stopped}\n")
    except MoeyardError as error:
        say_last(str(error))
        return 2 if isinstance(error, ValueError) else 1
    except OSError as error:  # a disk that fills up, a folder that goes away
        say_last(f"{error}; correct that and start again from the last checkpoint.")
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def train(config: RunConfig) -> None:
    """Run one training process to its end."""
    stop = StopRequest()
    stop.listen()
    keep_freed_memory()
    timeout_s = config.parallel.timeout_s
    claims: list[int] = []
    try:
        with process_group(timeout_s, stop) as watch:
            check_same_start(config, watch)
            num_experts = config.model.moe.num_experts if config.model.moe is not None else 1
            mesh = build_mesh(config.parallel.ep, num_experts, watch, timeout_s)
            run_dir = Path(config.run_dir)
            mesh.on_rank_0(lambda: claims.append(claim_run_folder(run_dir)))
            check_shared_folder(run_dir, watch)
            Trainer(config, run_dir, mesh, stop).run()
    finally:
        for claim in claims:
            os.close(claim)


if __name__ == "__main__":
    status = main()
    if status and is_torchrun_worker():
        # Everything is reported and closed. torch's exit handlers may take seconds on a busy host,
        # or wait for a stopped rank, while torchrun waits for this process.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
