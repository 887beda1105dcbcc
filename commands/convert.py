"""``moeyard convert``: a Hugging Face folder in another dtype."""

import argparse
import sys
from pathlib import Path

from ..dtypes import short_name
from ..errors import ConfigError
from .options import Parsers, add_allow_code, add_command, add_ignore_unused_weights


def add(parsers: Parsers) -> None:
    """Add the command."""
    convert = add_command(parsers, "convert", "write a Hugging Face folder in another dtype")
    convert.add_argument("source", type=Path, metavar="SRC", help="model folder to read")
    convert.add_argument("target", type=Path, metavar="DST", help="folder to write")
    convert.add_argument(
        "--dtype",
        type=short_name,
        choices=("fp32", "bf16", "int8", "int4", "mixed"),
        help="of the weights; torch's float32 and bfloat16 work, too; int8 and int4 apply to "
        "routed experts; mixed gives each of them one of these two; default: as stored",
    )
    convert.add_argument(
        "--calibration",
        type=Path,
        metavar="TEXT",
        help="for mixed: UTF-8 text that says how much each expert matters",
    )
    convert.add_argument(
        "--tolerance",
        type=float,
        metavar="SHARE",
        help="for mixed: how much higher perplexity on that text may be than the exact model's; "
        "default: 0.01",
    )
    add_ignore_unused_weights(convert)
    add_allow_code(convert)
    convert.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Write a Hugging Face folder in another dtype."""
    from ..moe.folders.convert import convert
    from ..moe.routers.own_code import allow

    allow(arguments.allow_code)
    if arguments.dtype == "mixed":
        _run_mixed(arguments)
        return
    for name in ("calibration", "tolerance"):
        if getattr(arguments, name) is not None:
            raise ConfigError(f"--{name} is for --dtype mixed; leave it out, or use that.")
    no_argument = ("run", "allow_code", "calibration", "tolerance")
    given = {name: value for name, value in vars(arguments).items() if name not in no_argument}
    model_type = convert(**given)
    sys.stdout.write(f"converted folder={arguments.target} model_type={model_type}\n")


def _run_mixed(arguments: argparse.Namespace) -> None:
    from ..serving.widths.convert import convert_mixed

    if arguments.calibration is None:
        raise ConfigError("--dtype mixed needs a text; give --calibration FILE.")
    tolerance = 0.01 if arguments.tolerance is None else arguments.tolerance
    found = convert_mixed(
        arguments.source,
        arguments.target,
        arguments.calibration,
        tolerance,
        arguments.ignore_unused_weights,
    )
    sys.stdout.write(f"converted folder={arguments.target}\n{found.sentence()}\n")
