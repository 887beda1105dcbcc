"""``moeyard routers``: every router, and the options of one."""

import argparse
import sys

from .options import Parsers, add_command


def add(parsers: Parsers) -> None:
    """Add the command."""
    routers = add_command(parsers, "routers", "list all routers, or show the options of one")
    routers.add_argument("name", nargs="?", metavar="NAME", help="router to show; default: a list")
    routers.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print the list, or one router's fields."""
    from ..moe.routers.describe import describe, table

    text = table() if arguments.name is None else describe(arguments.name)
    sys.stdout.write(text)
