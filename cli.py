"""The ``moeyard`` command."""

import argparse
import sys

from . import __version__
from .commands import (
    chat,
    classify,
    convert,
    doctor,
    evaluate,
    export,
    generate,
    merge,
    plan,
    price,
    report,
    routers,
    serve,
    simulate,
    sparsify,
    sparsity,
    tokenize,
    trace,
    train,
    upcycle,
    upscale,
)
from .commands.options import HelpFormatter, report_errors
from .system import stop_unless_it_can_run

COMMANDS = (
    train,
    export,
    generate,
    chat,
    classify,
    upscale,
    evaluate,
    price,
    plan,
    serve,
    tokenize,
    convert,
    upcycle,
    merge,
    sparsify,
    sparsity,
    report,
    simulate,
    trace,
    routers,
    doctor,
)
"""In the order of the help."""


def main(argv: list[str] | None = None) -> int:
    """Run the command; return 0 when done, 1 failed, 2 for bad input, 130 when interrupted."""
    stop_unless_it_can_run()
    parser = build_parser()
    arguments, others = parser.parse_known_args(argv)
    if "others" in arguments:
        arguments.others = others
    elif others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    return report_errors(lambda: arguments.run(arguments))


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        prog="moeyard",
        description="Sparse Mixture-of-Experts language models: train, export, serve.",
        epilog="moeyard COMMAND --help shows the options of a command with their defaults.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"moeyard {__version__}")
    parsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(parsers)
    return parser


if __name__ == "__main__":
    sys.exit(main())
