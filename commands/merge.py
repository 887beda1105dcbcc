"""``moeyard merge``: a folder with experts as a dense one."""

import argparse
import sys
from pathlib import Path

from .options import Parsers, add_command, add_ignore_unused_weights


def add(parsers: Parsers) -> None:
    """Add the command."""
    merge = add_command(parsers, "merge", "write a folder with experts as a dense one")
    merge.add_argument("source", type=Path, metavar="SRC", help="model folder with experts")
    merge.add_argument("target", type=Path, metavar="DST", help="folder to write")
    merge.add_argument(
        "--split",
        type=int,
        help="slices of the dense MLP, one expert each; further experts are copies and averaged "
        "(default: as many as experts; 1 averages all)",
    )
    add_ignore_unused_weights(merge)
    merge.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Write a folder with experts as a dense one."""
    from ..moe.folders.merge import merge

    given = {name: value for name, value in vars(arguments).items() if name != "run"}
    model_type = merge(**given)
    sys.stdout.write(f"merged folder={arguments.target} model_type={model_type}\n")
