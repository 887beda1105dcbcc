"""``moeyard recommend``: the items that users may want next."""

import argparse
import json
import sys
from pathlib import Path

from ..errors import ConfigError
from .options import Parsers, add_command, add_loading, add_model


def add(parsers: Parsers) -> None:
    """Add the command."""
    recommend = add_command(
        parsers, "recommend", "print the items that users may want next, a JSON line for each user"
    )
    add_model(recommend)
    recommend.add_argument(
        "history",
        type=Path,
        metavar="HISTORY",
        help=".csv or .parquet with the columns user and item, in order of time, or .jsonl with "
        "user and items in each line",
    )
    recommend.add_argument("-k", type=int, default=5, metavar="N", help="items for each user")
    recommend.add_argument(
        "--beams", type=int, default=8, metavar="N", help="sessions that the beam search follows"
    )
    recommend.add_argument(
        "--batch", type=int, default=32, metavar="N", help="users computed together"
    )
    add_loading(recommend)
    recommend.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print a line for each user."""
    from ..training.data.histories import read_histories
    from .model_folder import open_kind_of

    if arguments.batch < 1:
        raise ConfigError(f"--batch is {arguments.batch}; use a number from 1 upwards.")
    if arguments.k < 1 or arguments.beams < 1:
        raise ConfigError(
            f"-k is {arguments.k} and --beams is {arguments.beams}; use numbers from 1 upwards."
        )
    histories = list(read_histories(arguments.history).items())
    model = open_kind_of(arguments, "recommender")
    for start in range(0, len(histories), arguments.batch):
        some = histories[start : start + arguments.batch]
        found = model([own for _, own in some], arguments.k, arguments.beams, arguments.batch)
        for (user, _), one in zip(some, found, strict=True):
            line = {"user": user, "items": one.items, "log_prob": one.log_prob}
            sys.stdout.write(json.dumps(line, ensure_ascii=False) + "\n")
