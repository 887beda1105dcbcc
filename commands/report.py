"""``moeyard report``: an HTML page about a training run."""

import argparse
import sys
from pathlib import Path

from .options import Parsers, add_command


def add(parsers: Parsers) -> None:
    """Add the command."""
    report = add_command(parsers, "report", "write an HTML page about a training run")
    report.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="folder of a training run")
    report.add_argument(
        "-o", "--out", type=Path, help="file to write; default: RUN_DIR/report.html"
    )
    report.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Write the page of a run."""
    from ..training.report.page import write_report

    path, damage = write_report(arguments.run_dir, arguments.out)
    if damage is not None:
        sys.stderr.write(f"warning: {damage}\n")
    sys.stdout.write(f"report file={path}\n")
