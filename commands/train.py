"""``moeyard train``: start a run, or go on with one."""

import argparse
import json
import os
import sys
from pathlib import Path

from ..configuration import read_values, with_others
from ..errors import ConfigError
from ..training.key_check import check_keys
from .options import Parsers, add_allow_code, add_command

PROGRAM = "moeyard.training"


def add(parsers: Parsers) -> None:
    """Add the command."""
    train = add_command(parsers, "train", "train a model, or go on with a run")
    train.add_argument(
        "config", type=Path, metavar="CONFIG|RUN_DIR", help="YAML file, or folder of a run"
    )
    train.add_argument("overrides", nargs="*", metavar="a.b=c", help="keys to change")
    train.add_argument(
        "--nproc",
        type=int,
        metavar="N",
        help="processes on this machine, one for each GPU; default: as many as RUN_DIR had, or 1",
    )
    train.add_argument(
        "--print-config", action="store_true", help="print the final configuration and stop"
    )
    add_allow_code(train)
    train.set_defaults(run=run, others=[])


def run(arguments: argparse.Namespace) -> int:
    """Check what can be checked quickly, then start the ranks."""
    config, overrides = arguments.config, with_others(arguments.overrides, arguments.others)
    num_ranks = 1 if arguments.nproc is None else arguments.nproc
    if config.is_dir():
        if arguments.nproc is None:
            num_ranks = _ranks_of(config)
        overrides = [f"run_dir={json.dumps(str(config))}", *overrides]
        config = _config_of(config)
    if num_ranks < 1:
        raise ConfigError(f"--nproc is {num_ranks}; use 1 or more.")
    check_keys(read_values(config, overrides))
    given = [str(config), *overrides]
    given += [f"--allow-code={module}" for module in arguments.allow_code]
    if arguments.print_config:
        given.append("--print-config")
    if num_ranks == 1 or arguments.print_config:
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, "-m", PROGRAM, *given])

    from ..parallel.local_ranks import run_ranks

    return run_ranks(PROGRAM, given, num_ranks)


def _config_of(run_dir: Path) -> Path:
    config = run_dir / "config.yaml"
    if config.is_file():
        return config
    if (run_dir / "config.json").is_file():
        raise ConfigError(
            f"{run_dir} is a model folder, not a run; give a YAML file and start_from={run_dir}."
        )
    raise ConfigError(
        f"{run_dir} has no config.yaml, so no run has started there; give a YAML file and "
        f"run_dir={run_dir}."
    )


def _ranks_of(run_dir: Path) -> int:
    """Return the number of ranks of the run's last start on one machine, 1 if it is not known."""
    try:
        last = (run_dir / "starts.jsonl").read_text(encoding="utf-8").splitlines()[-1]
        return int(json.loads(last)["ranks"])
    except (OSError, ValueError, LookupError):
        return 1
