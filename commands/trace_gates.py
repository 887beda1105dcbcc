"""``moeyard trace gates``: fit the routers of the next layers to a model's rows."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError, DataError
from .options import (
    Parsers,
    add_allow_code,
    add_command,
    add_dtype,
    add_expert_store,
    add_ignore_unused_weights,
    add_model,
    cannot_write,
    read_text,
)
from .trace_predict import recall_table

if TYPE_CHECKING:
    from torch import Tensor

    from ..moe.models.language_model import LanguageModel
    from ..serving.experts.predictors.recall import Recall


def add(kinds: Parsers) -> None:
    """Add the command."""
    gates = add_command(
        kinds, "gates", "fit the routers of the next layers to a model's rows, to read ahead by"
    )
    add_model(gates)
    gates.add_argument(
        "--text", type=Path, metavar="FILE", required=True, help="UTF-8 text like your requests"
    )
    gates.add_argument(
        "--tokens", type=int, default=20_000, metavar="N", help="of the text, the first ones"
    )
    gates.add_argument(
        "--held-out",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="of these tokens, the last ones, to judge by",
    )
    gates.add_argument(
        "-o",
        "--out",
        type=Path,
        metavar="OUT",
        required=True,
        help="file to write, for --expert-predictor fitted_gates:OUT",
    )
    gates.add_argument("--json", action="store_true", help="print JSON")
    add_dtype(gates)
    add_expert_store(gates)
    add_ignore_unused_weights(gates)
    add_allow_code(gates)
    gates.set_defaults(run=run, device="cpu")


def run(arguments: argparse.Namespace) -> None:
    """Fit and judge; write the file and print a table."""
    from ..progress import Progress
    from ..serving.experts.predictors.fit_gates import fit_gates, judge_gates, num_steps
    from ..serving.experts.predictors.fitted_gates import save
    from ..serving.experts.predictors.next_gates import NextGates
    from ..serving.experts.predictors.table import check_fit, facts_of
    from .model_folder import open_model

    if not 0 < arguments.held_out < 1:
        raise ConfigError(f"--held-out is {arguments.held_out:g}; use a share between 0 and 1.")
    if arguments.tokens < 1:
        raise ConfigError(f"--tokens is {arguments.tokens}; use 1 or more.")
    text = read_text(arguments.text)
    model = open_model(arguments)
    check_fit("next_gates", model.config)
    facts = facts_of(model.config)
    if not facts.foretelling:
        raise DataError(
            f"the model has {len(facts.moe_layers)} MoE layers, so there is nothing to foretell; "
            "use --expert-predictor none."
        )
    learned, held = _texts(arguments, model, text)
    decoder = model.decoder
    with Progress("fitting", num_steps(facts, decoder, len(learned))) as progress:
        maps = fit_gates(facts, decoder, learned, progress.advance)
    found = {
        "next_gates": judge_gates(facts, decoder, held, NextGates(facts, decoder)),
        "fitted_gates": judge_gates(facts, decoder, held, NextGates(facts, decoder, maps)),
    }
    try:
        save(arguments.out, facts, maps)
    except OSError as error:
        raise cannot_write("--out", arguments.out, error) from None
    _print(arguments, found, sum(map(len, learned)), sum(map(len, held)))


def _texts(
    arguments: argparse.Namespace, model: "LanguageModel", text: str
) -> "tuple[list[Tensor], list[Tensor]]":
    """Return pieces of the text to learn from, and others to judge by."""
    from ..serving.experts.predictors.fit_gates import pieces

    ids = model.tokenizer.encode(text)[: arguments.tokens]
    first = round(len(ids) * (1 - arguments.held_out))
    longest = model.config.max_positions
    parts = pieces(ids[:first], longest), pieces(ids[first:], longest)
    if not all(parts):
        raise DataError(
            f"--text has {len(ids)} tokens of which --held-out leaves {first} to learn from; give "
            "a longer text."
        )
    return parts


def _print(
    arguments: argparse.Namespace, found: "dict[str, list[Recall]]", learned: int, held: int
) -> None:
    facts = {"learned_tokens": learned, "held_out_tokens": held, "file": str(arguments.out)}
    if arguments.json:
        predictors = {name: [r.as_dict() for r in recalls] for name, recalls in found.items()}
        sys.stdout.write(json.dumps({**facts, "predictors": predictors}, indent=1) + "\n")
        return
    sys.stdout.write("fitted " + " ".join(f"{key}={value}" for key, value in facts.items()) + "\n")
    sys.stdout.write(recall_table(found))
