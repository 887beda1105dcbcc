"""``moeyard convert``: a Hugging Face folder in another dtype."""

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..dtypes import short_name
from ..errors import ConfigError, ModelFileError
from .options import Parsers, add_allow_code, add_command, add_ignore_unused_weights

if TYPE_CHECKING:
    from ..moe.folders.write_group_sparse import Pruner

log = logging.getLogger(__name__)

MIXED, INT4_SPARSE, TWO_OF_FOUR = "mixed", "int4_sparse", "2:4"
NONE, FIT = "none", "fit"
"""What ``--recovery`` takes."""
WITH_CHANNELS = (None, "fp32", "bf16")
"""Types whose experts may be laid out by channel."""
ONLY_FOR = {
    "calibration": (MIXED, INT4_SPARSE),
    "tolerance": (MIXED,),
    "sparsity": (INT4_SPARSE,),
    "recovery": (INT4_SPARSE,),
}
"""Options that only some dtypes take."""


def add(parsers: Parsers) -> None:
    """Add the command."""
    convert = add_command(parsers, "convert", "write a Hugging Face folder in another dtype")
    convert.add_argument("source", type=Path, metavar="SRC", help="model folder to read")
    convert.add_argument("target", type=Path, metavar="DST", help="folder to write")
    convert.add_argument(
        "--dtype",
        type=short_name,
        choices=("fp32", "bf16", "int8", "int4", MIXED, INT4_SPARSE, TWO_OF_FOUR),
        help="of the weights; torch's float32 and bfloat16 work, too; int8, int4 and int4_sparse "
        "apply to routed experts; mixed gives each of them int8 or int4; 2:4 is bf16 without the "
        "zeros of experts trained as 2 of 4; default: as stored",
    )
    convert.add_argument(
        "--calibration",
        type=Path,
        metavar="TEXT",
        help="UTF-8 text like what the model will see: mixed and int4_sparse need it to judge what "
        "matters",
    )
    convert.add_argument(
        "--tolerance",
        type=float,
        metavar="SHARE",
        help="for mixed: how much higher perplexity on that text may be than the exact model's; "
        "default: 0.01",
    )
    convert.add_argument(
        "--sparsity",
        type=float,
        metavar="SHARE",
        help="for int4_sparse: share of the experts' weights to prune; default: 0.5",
    )
    convert.add_argument(
        "--expert-layout",
        choices=("matrices", "channels"),
        default="matrices",
        help="how experts lie on the disk: as three matrices, or each channel's row of up and "
        "column of down side by side, so that serve --expert-sparsity reads only those it needs",
    )
    convert.add_argument(
        "--recovery",
        choices=(NONE, FIT),
        help="for int4_sparse: how the weights that are left make up for the others: not at all, "
        f"or fitted to the exact outputs on the calibration text; default: {FIT}",
    )
    add_ignore_unused_weights(convert)
    add_allow_code(convert)
    convert.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Write a Hugging Face folder in another dtype."""
    from ..moe.folders.convert import convert
    from ..moe.routers.own_code import allow

    allow(arguments.allow_code)
    for name, dtypes in ONLY_FOR.items():
        if getattr(arguments, name) is not None and arguments.dtype not in dtypes:
            raise ConfigError(
                f"--{name} is for --dtype {' and '.join(dtypes)}; leave it out, or use that."
            )
    if arguments.dtype in ONLY_FOR["calibration"] and arguments.calibration is None:
        raise ConfigError(f"--dtype {arguments.dtype} needs a text; give --calibration FILE.")
    by_channel = arguments.expert_layout == "channels"
    if by_channel and arguments.dtype not in WITH_CHANNELS:  # before any calibration
        raise ConfigError(
            f"--expert-layout is channels and --dtype {arguments.dtype}, but only experts in fp32 "
            "or bf16 have channels to read one by one; leave one out."
        )
    if arguments.dtype == MIXED:
        _run_mixed(arguments)
        return
    model_type = convert(
        arguments.source,
        arguments.target,
        arguments.dtype,
        arguments.ignore_unused_weights,
        sparsity=arguments.sparsity,
        pruner=_pruner(arguments) if arguments.dtype == INT4_SPARSE else None,
        by_channel=by_channel,
    )
    sys.stdout.write(f"converted folder={arguments.target} model_type={model_type}\n")


def _run_mixed(arguments: argparse.Namespace) -> None:
    from ..serving.widths.convert import convert_mixed

    tolerance = 0.01 if arguments.tolerance is None else arguments.tolerance
    found = convert_mixed(
        arguments.source,
        arguments.target,
        arguments.calibration,
        tolerance,
        arguments.ignore_unused_weights,
    )
    sys.stdout.write(f"converted folder={arguments.target}\n{found.sentence()}\n")


def _pruner(arguments: argparse.Namespace) -> "Pruner":
    """Run the model on the text; with experts on disk if they do not fit into memory."""
    from ..moe.folders.calibration import calibrate, windows_of
    from ..moe.folders.folder import ModelFolder
    from ..moe.folders.group_sparse_format import choose_sparsity
    from ..moe.folders.hub import local_folder
    from ..serving.loading import open_model
    from ..serving.pruning.recover import recover

    source = local_folder(arguments.source)
    folder = ModelFolder(source)
    store = None
    try:
        # What would fail after a long calibration fails before it.
        sparsity = 0.5 if arguments.sparsity is None else arguments.sparsity
        packed = choose_sparsity(folder.config, sparsity)
        if arguments.target.exists():
            raise ModelFileError(f"{arguments.target} exists already; choose another folder.")
        model, store = open_model(
            source,
            expert_memory="auto",
            ignore_unused_weights=arguments.ignore_unused_weights,
            allow_code=arguments.allow_code,
        )
        if arguments.recovery == NONE:
            found = calibrate(model, folder, arguments.calibration)
            if few := found.few_rows():
                log.warning(
                    "%d experts saw few rows of the calibration text and are judged by all rows of "
                    "their layer; give a longer text.",
                    few,
                )
            return found
        windows_BL = windows_of(model, arguments.calibration)
        recovered = recover(model.decoder, folder, windows_BL, packed)
    finally:
        if store is not None:
            store.close()
        folder.close()
    if few := recovered.num_plain:
        log.warning(
            "%d experts saw few rows for their number of inputs and are pruned without recovery; "
            "give a longer text.",
            few,
        )
    return recovered
