"""``moeyard sparsity``: measure which channels of experts are small."""

import argparse
import sys
from pathlib import Path

from .options import (
    Parsers,
    add_allow_code,
    add_command,
    add_dtype,
    add_model,
    cannot_write,
    read_text,
)
from .options import add_ignore_unused_weights as add_ignore

ALLOCATIONS = ("uniform", "greedy")
SCORES = ("teal", "wina", "cats", "chess")


def add(parsers: Parsers) -> None:
    """Add the command."""
    sparsity = add_command(
        parsers, "sparsity", "measure thresholds for --expert-sparsity of other commands"
    )
    add_model(sparsity)
    sparsity.add_argument(
        "--text", type=Path, metavar="FILE", required=True, help="UTF-8 text to measure on"
    )
    sparsity.add_argument(
        "--score",
        choices=SCORES,
        default="cats",
        help="what is compared with the threshold: teal and wina leave out inputs of all three "
        "products, cats and chess rows of up and columns of down",
    )
    sparsity.add_argument(
        "--target", type=float, default=0.4, metavar="SHARE", help="channels that count as 0"
    )
    sparsity.add_argument(
        "--allocation",
        choices=ALLOCATIONS,
        default="uniform",
        help="how teal and wina share the target between a layer's products; greedy searches",
    )
    sparsity.add_argument(
        "-o", "--out", type=Path, metavar="FILE", required=True, help="file to write"
    )
    sparsity.add_argument(
        "--length", type=int, metavar="N", help="tokens of a window; default: the model's longest"
    )
    add_dtype(sparsity)
    add_ignore(sparsity)
    add_allow_code(sparsity)
    sparsity.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Measure, and write the file."""
    from ..serving.evaluation.measure_sparsity import measure_sparsity
    from ..serving.experts.sparsity import save_sparsity
    from ..serving.loading import open_model
    from .model_folder import model_folder

    text = read_text(arguments.text)
    model, _ = open_model(
        model_folder(arguments.model),
        dtype=arguments.dtype,
        ignore_unused_weights=arguments.ignore_unused_weights,
        allow_code=arguments.allow_code,
    )
    how = (arguments.score, arguments.target, arguments.length, arguments.allocation)
    found = measure_sparsity(model, text, *how)
    try:
        save_sparsity(arguments.out, found)
    except OSError as error:
        raise cannot_write("--out", arguments.out, error) from None
    sys.stdout.write(f"measured score={found.score} target={found.target:g} file={arguments.out}\n")
