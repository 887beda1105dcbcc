"""``moeyard translate``: what an encoder-decoder writes for texts."""

import argparse
import json
import sys
from pathlib import Path

from ..errors import ConfigError
from .options import Parsers, add_command, add_loading, add_model


def add(parsers: Parsers) -> None:
    """Add the command."""
    translate = add_command(
        parsers, "translate", "print what a model writes for texts, a JSON line for each"
    )
    add_model(translate)
    translate.add_argument(
        "file",
        type=Path,
        nargs="?",
        metavar="FILE",
        help=".jsonl, .json or .csv with a text in each record, or a file with one text a line",
    )
    translate.add_argument(
        "--text", metavar="TEXT", action="append", help="a text, in place of FILE; may be repeated"
    )
    translate.add_argument(
        "--text-key", default="source", metavar="KEY", help="key of a text in FILE; default: source"
    )
    translate.add_argument(
        "--length",
        type=int,
        metavar="N",
        help="tokens of a text that are read; default: that of the run's training, or the model's "
        "most",
    )
    translate.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="most tokens that are written; default: as --length",
    )
    translate.add_argument(
        "--beams",
        type=int,
        default=1,
        metavar="N",
        help="beginnings that are followed together; default: 1, always the likeliest token",
    )
    translate.add_argument(
        "--length-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="finished texts compete by log-probability over tokens to the power of this; "
        "default: 1.0",
    )
    translate.add_argument(
        "--batch", type=int, default=16, metavar="N", help="texts computed together; default: 16"
    )
    add_loading(translate)
    translate.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print a line for each text."""
    from .model_folder import open_kind_of, trained_length

    texts = _texts(arguments)
    model = open_kind_of(arguments, "encoder_decoder")
    trained = trained_length(arguments.model)
    length = arguments.length or trained
    most, beams = arguments.max_new_tokens or length, arguments.beams
    how = (most, beams, arguments.length_penalty, length, arguments.batch)
    num_cut = 0
    for start in range(0, len(texts), arguments.batch):
        for written in model(texts[start : start + arguments.batch], *how):
            num_cut += written.is_cut
            line = {"text": written.text, "score": written.score, "is_ended": written.is_ended}
            sys.stdout.write(json.dumps(line, ensure_ascii=False) + "\n")
    if num_cut:
        sys.stderr.write(f"event=cut texts={num_cut} of={len(texts)}\n")


def _texts(arguments: argparse.Namespace) -> list[str]:
    """Return the texts of FILE or ``--text``."""
    from ..training.data.labelled_records import read_texts

    if (arguments.text is None) == (arguments.file is None):
        raise ConfigError("FILE and --text: give exactly one of them.")
    if arguments.batch < 1:
        raise ConfigError(f"--batch is {arguments.batch}; use a number from 1 upwards.")
    if arguments.file is None:
        return list(arguments.text)
    if not arguments.file.is_file():
        raise ConfigError(f"FILE is {str(arguments.file)!r}, which is not there; give another.")
    texts = list(read_texts(arguments.file, arguments.text_key))
    if not texts:
        raise ConfigError(f"{arguments.file} has no text; give a file with some.")
    return texts
