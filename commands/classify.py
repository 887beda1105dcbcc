"""``moeyard classify``: the labels of texts."""

import argparse
import json
import sys
from pathlib import Path

from ..errors import ConfigError
from .options import Parsers, add_command, add_loading, add_model


def add(parsers: Parsers) -> None:
    """Add the command."""
    classify = add_command(parsers, "classify", "print the labels of texts, a JSON line for each")
    add_model(classify)
    classify.add_argument(
        "file",
        type=Path,
        nargs="?",
        metavar="FILE",
        help=".jsonl, .json or .csv with a text in each record, or a file with one text a line",
    )
    classify.add_argument(
        "--text", metavar="TEXT", action="append", help="a text, in place of FILE; may be repeated"
    )
    classify.add_argument(
        "--text-key", default="text", metavar="KEY", help="key of a text in FILE; default: text"
    )
    classify.add_argument(
        "--length",
        type=int,
        metavar="N",
        help="tokens of a text that are read; default: that of the run's training, or the model's "
        "most",
    )
    classify.add_argument(
        "--batch", type=int, default=32, metavar="N", help="texts computed together; default: 32"
    )
    add_loading(classify)
    classify.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print a line for each text."""
    from ..training.data.labelled_records import read_texts
    from .model_folder import open_kind_of, trained_length

    if (arguments.text is None) == (arguments.file is None):
        raise ConfigError("FILE and --text: give exactly one of them.")
    if arguments.batch < 1:
        raise ConfigError(f"--batch is {arguments.batch}; use a number from 1 upwards.")
    texts = arguments.text
    if arguments.file is not None:
        if not arguments.file.is_file():
            raise ConfigError(f"FILE is {str(arguments.file)!r}, which is not there; give another.")
        texts = list(read_texts(arguments.file, arguments.text_key))
        if not texts:
            raise ConfigError(f"{arguments.file} has no text; give a file with some.")
    model = open_kind_of(arguments, "encoder")
    length = arguments.length or trained_length(arguments.model)
    num_cut = 0
    for start in range(0, len(texts), arguments.batch):
        for found in model(texts[start : start + arguments.batch], length, arguments.batch):
            num_cut += found.is_cut
            line = {"label": found.label, "probabilities": found.probabilities}
            sys.stdout.write(json.dumps(line, ensure_ascii=False) + "\n")
    if num_cut:
        sys.stderr.write(f"event=cut texts={num_cut} of={len(texts)}\n")
