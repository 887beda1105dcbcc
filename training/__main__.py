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
import traceback
from pathlib import Path

from ..configuration import read_values, with_others
from ..errors import MoeyardError, Stopped
from ..parallel.watch.last_word import say_last
from .key_check import check_keys

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
    arguments, others = parser.parse_known_intermixed_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        arguments.overrides = with_others(arguments.overrides, others)
        _run(arguments)
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


def _run(arguments: argparse.Namespace) -> None:
    """Check the keys, which is quick, import everything, and train."""
    values = read_values(arguments.config, arguments.overrides)
    check_keys(values)
    from ..moe.routers.own_code import allow
    from .program import train
    from .read_config import complete_run_config
    from .run.folder import dump_config

    allow(arguments.allow_code)
    config = complete_run_config(values)
    if arguments.print_config:
        sys.stdout.write(dump_config(config))
        return
    open_source = None
    if config.train.expert_memory is not None:
        # The only import of serving in training: a program may know both (docs/architecture.md).
        from ..serving.frozen_experts import open_frozen

        open_source = open_frozen
    train(config, open_source)


def _status() -> int:
    """Return the exit status; print the traceback of an error that is our bug."""
    try:
        return main()
    except Exception:
        if not is_torchrun_worker():
            raise
        traceback.print_exc()
        return 1


if __name__ == "__main__":
    status = _status()
    if status:
        # Everything is reported and closed. torch's exit handlers may take seconds on a busy host,
        # or wait for a stopped rank, while torchrun waits for this process. A thread that still
        # writes a checkpoint would be in their way, too.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
