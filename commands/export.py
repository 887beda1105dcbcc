"""``moeyard export``: a run's newest checkpoint as a Hugging Face folder."""

import argparse
import sys
from pathlib import Path

from .options import Parsers, add_allow_code, add_command


def add(parsers: Parsers) -> None:
    """Add the command."""
    export = add_command(
        parsers, "export", "write a run's newest checkpoint as a Hugging Face folder"
    )
    export.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="folder of a training run")
    export.add_argument("out_dir", type=Path, metavar="OUT_DIR", help="folder to write")
    export.add_argument(
        "--adapter",
        action="store_true",
        help="write the low-rank updates of a lora run alone, as an adapter folder",
    )
    add_allow_code(export)
    export.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Write the folder."""
    from ..moe.routers.own_code import allow
    from ..training.checkpoints.export import export
    from ..training.checkpoints.export_adapter import export_adapter

    allow(arguments.allow_code)
    write = export_adapter if arguments.adapter else export
    step = write(arguments.run_dir, arguments.out_dir)
    sys.stdout.write(f"exported step={step} folder={arguments.out_dir}\n")
