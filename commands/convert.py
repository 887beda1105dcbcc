"""``moeyard convert``: a Hugging Face folder in another dtype."""

import argparse
import sys
from pathlib import Path

from ..dtypes import short_name
from .options import Parsers, add_allow_code, add_command, add_ignore_unused_weights


def add(parsers: Parsers) -> None:
    """Add the command."""
    convert = add_command(parsers, "convert", "write a Hugging Face folder in another dtype")
    convert.add_argument("source", type=Path, metavar="SRC", help="model folder to read")
    convert.add_argument("target", type=Path, metavar="DST", help="folder to write")
    convert.add_argument(
        "--dtype",
        type=short_name,
        choices=("fp32", "bf16", "int8", "int4"),
        help="of the weights; torch's float32 and bfloat16 work, too; int8 and int4 apply to "
        "routed experts; default: as stored",
    )
    add_ignore_unused_weights(convert)
    add_allow_code(convert)
    convert.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Write a Hugging Face folder in another dtype."""
    from ..moe.folders.convert import convert
    from ..moe.routers.own_code import allow

    allow(arguments.allow_code)
    no_argument = ("run", "allow_code")
    given = {name: value for name, value in vars(arguments).items() if name not in no_argument}
    model_type = convert(**given)
    sys.stdout.write(f"converted folder={arguments.target} model_type={model_type}\n")
