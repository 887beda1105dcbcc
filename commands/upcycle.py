"""``moeyard upcycle``: a dense Hugging Face folder as one with experts."""

import argparse
import sys
from pathlib import Path

from .options import Parsers, add_command, add_ignore_unused_weights


def add(parsers: Parsers) -> None:
    """Add the command."""
    upcycle = add_command(
        parsers, "upcycle", "write a dense Hugging Face folder as one with experts"
    )
    upcycle.add_argument("source", type=Path, metavar="SRC", help="dense model folder")
    upcycle.add_argument("target", type=Path, metavar="DST", help="folder to write")
    upcycle.add_argument("--num-experts", type=int, required=True, help="experts per layer")
    upcycle.add_argument("--k", type=int, required=True, help="experts each token visits")
    upcycle.add_argument(
        "--split",
        type=int,
        help="slices of the dense MLP, one expert each (default 1; with routed_ffn and stochastic "
        "as many as experts)",
    )
    upcycle.add_argument(
        "--moe-layers",
        choices=("all", "every-2", "last-half"),
        default="all",
        help="layers that get experts",
    )
    upcycle.add_argument(
        "--router",
        choices=("topk", "routed_ffn", "stochastic"),
        default="topk",
        help="topk: copies of the MLP; routed_ffn: k slices of one MLP (SPT); stochastic: random "
        "slices in training (Split & Merge)",
    )
    upcycle.add_argument("--seed", type=int, default=0, help="seed of the new routers")
    add_ignore_unused_weights(upcycle)
    upcycle.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Write a dense folder as one with experts."""
    from ..moe.folders.upcycle import upcycle

    given = {name: value for name, value in vars(arguments).items() if name != "run"}
    model_type = upcycle(**given)
    sys.stdout.write(f"upcycled folder={arguments.target} model_type={model_type}\n")
