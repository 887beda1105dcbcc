"""``moeyard sparsify``: a dense Hugging Face folder as one with dynamic experts."""

import argparse
import sys
from pathlib import Path

from .options import Parsers, add_command, add_ignore_unused_weights, read_text


def add(parsers: Parsers) -> None:
    """Add the command."""
    sparsify = add_command(
        parsers, "sparsify", "cut a dense folder into experts of which each token runs as few as do"
    )
    sparsify.add_argument("source", metavar="SRC", help="dense model folder, or a name of the hub")
    sparsify.add_argument("target", type=Path, metavar="DST", help="folder to write")
    sparsify.add_argument(
        "--data",
        type=Path,
        metavar="TEXT",
        required=True,
        help="UTF-8 text to train on; its last tenth is held out",
    )
    _add_cut(sparsify)
    _add_training(sparsify)
    add_ignore_unused_weights(sparsify)
    sparsify.set_defaults(run=run)


def _add_cut(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--experts", type=int, default=32, metavar="N", help="parts of each MLP")
    parser.add_argument(
        "--rule",
        choices=("max", "share"),
        default="max",
        help="run experts whose predicted norm is tau times the largest or more, or the fewest "
        "that have the share tau of all",
    )
    parser.add_argument(
        "--tau",
        type=float,
        help="threshold of the rule; default: the cheapest within --tolerance",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="how much of the held-out loss with all experts a threshold may add to it",
    )


def _add_training(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--steps",
        type=int,
        default=0,
        metavar="N",
        help="steps of fine-tuning for sparse activations; 0 = none",
    )
    parser.add_argument(
        "--activation",
        choices=("swiglu", "reglu"),
        default="swiglu",
        help="reglu puts ReLU in place of SiLU, which needs --steps",
    )
    parser.add_argument(
        "--sparsity", type=float, default=0.3, metavar="W", help="weight of the sparsity loss"
    )
    parser.add_argument("--lr", type=float, default=3e-4, help="learning rate of the fine-tuning")
    parser.add_argument(
        "--router-steps", type=int, default=1000, metavar="N", help="steps of the routers' training"
    )
    parser.add_argument("--router-lr", type=float, default=2e-3, help="their learning rate")
    parser.add_argument(
        "--router-width", type=int, default=128, metavar="N", help="hidden width of a router"
    )
    parser.add_argument("--length", type=int, default=256, metavar="N", help="tokens of a window")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="windows of a step")
    parser.add_argument(
        "--eval-windows", type=int, default=64, metavar="N", help="held-out windows, at most"
    )
    parser.add_argument("--seed", type=int, default=0, help="of windows, clusters and routers")


def run(arguments: argparse.Namespace) -> None:
    """Write the folder, and print the table of thresholds."""
    from ..configuration import validate_config
    from ..training.sparsify.settings import Settings
    from ..training.sparsify.sparsify import sparsify
    from ..training.stop import StopRequest

    names = Settings.model_fields
    settings = validate_config(
        Settings, {name: value for name, value in vars(arguments).items() if name in names}
    )
    stop = StopRequest()
    stop.listen()
    found = sparsify(
        arguments.source,
        arguments.target,
        arguments.data,
        read_text(arguments.data, "--data"),
        settings,
        stop,
        arguments.ignore_unused_weights,
    )
    write = sys.stdout.write
    write("   tau    loss  of dense  experts  MLP operations  all operations\n")
    for row in found.rows:
        write(
            f"{row.tau:6.3f}  {row.loss:.4f}  {row.loss / found.dense_loss:8.4f}  "
            f"{row.experts:7.2f}  {row.mlp_flops:14.3f}  {row.flops:14.3f}\n"
        )
    write(
        f"sparsified folder={arguments.target} tau={found.row.tau:g} loss={found.row.loss:.4f} "
        f"dense_loss={found.dense_loss:.4f} experts={found.row.experts:.2f} of {settings.experts} "
        f"mlp_operations={found.row.mlp_flops:.3f} operations={found.row.flops:.3f}\n"
    )
