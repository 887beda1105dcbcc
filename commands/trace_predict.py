"""``moeyard trace predict``: how well predictors foretell recorded choices, and training one."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError, DataError
from .options import Parsers, add_command, add_route_files, cannot_write

if TYPE_CHECKING:
    from ..moe.routes.format import RouteHeader
    from ..moe.routes.rows import Array, Routes
    from ..serving.experts.predictors.predictor import PredictorFacts
    from ..serving.experts.predictors.recall import Recall

LEGEND = """\
distance: MoE layers between the choice that a predictor has seen and the one that it foretells
width: how many experts it names for a token; recall: share of the needed experts that it names
precision: share of the named experts that are needed
"""


def add(kinds: Parsers) -> None:
    """Add the command."""
    predict = add_command(
        kinds, "predict", "say how well predictors foretell recorded choices, and train one"
    )
    add_route_files(predict)
    predict.add_argument(
        "--held-out",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="of the sequences, the last ones, to judge by; predictors learn from the others",
    )
    predict.add_argument(
        "--rows", type=int, default=2000, metavar="N", help="tokens to judge by, the first ones"
    )
    predict.add_argument(
        "--save",
        type=Path,
        metavar="OUT",
        help="write the trained predictor, for --expert-predictor trained:OUT",
    )
    predict.add_argument("--json", action="store_true", help="print JSON")
    predict.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Train and judge; print a table and write the trained predictor."""
    from ..serving.experts.predictors.predictor import PredictorFacts
    from ..serving.experts.predictors.recall import HINTS_COLUMN, judge_column, split
    from ..serving.experts.predictors.trained import save

    if not 0 < arguments.held_out < 1:
        raise ConfigError(f"--held-out is {arguments.held_out:g}; use a share between 0 and 1.")
    if arguments.rows < 1:
        raise ConfigError(f"--rows is {arguments.rows}; use 1 or more.")
    header, routes = _read(arguments.files)
    facts = PredictorFacts(
        header.moe_layers, header.num_experts, header.k, header.model.architecture
    )
    learned, held = split(routes, arguments.held_out)
    if not len(learned):
        raise DataError("the routes have one sequence, so nothing is held out; record several.")
    arrays = _fit(facts, learned)
    found = _judge_all(facts, learned, held, arrays, arguments.rows)
    if HINTS_COLUMN in held.columns:
        found["the run's own"] = judge_column(held, facts)
    if arguments.save is not None:
        try:
            save(arguments.save, facts, arrays)
        except OSError as error:
            raise cannot_write("--save", arguments.save, error) from None
    _print(arguments, found, {"learned_rows": len(learned), "held_out_rows": len(held)})


def _read(paths: list[Path]) -> "tuple[RouteHeader, Routes]":
    from ..moe.routes.reader import route_files
    from ..moe.routes.rows import Phase, joined

    files = route_files(paths)
    parts = [rows for file in files for rows in file.chunks()]
    for file in files:
        if file.damage is not None:
            sys.stderr.write(f"warning: {file.damage}\n")
    if not parts:
        raise DataError(f"{paths[0]} has no rows; record some.")
    routes = joined(parts)
    if (routes.phases_N == Phase.TRAIN).any():
        raise DataError(
            "the routes are those of training, whose weights change; give routes of generation."
        )
    if len(files[0].header.moe_layers) < 2:
        raise DataError("the model has one MoE layer, so there is nothing to foretell.")
    return files[0].header, routes


def _fit(facts: "PredictorFacts", learned: "Routes") -> "dict[str, Array]":
    from ..progress import Progress
    from ..serving.experts.predictors.fit import STEPS, fit

    with Progress("training", STEPS) as progress:
        return fit(facts, learned, report=progress.advance)


def _judge_all(
    facts: "PredictorFacts",
    learned: "Routes",
    held: "Routes",
    arrays: "dict[str, Array]",
    rows: int,
) -> "dict[str, list[Recall]]":
    from ..serving.experts.predictors.previous_token import PreviousToken
    from ..serving.experts.predictors.recall import judge
    from ..serving.experts.predictors.replay import learn
    from ..serving.experts.predictors.table import LEARNING
    from ..serving.experts.predictors.trained import Trained

    found = {"previous_token": judge(PreviousToken(facts), held, facts, rows)}
    for name, kind in LEARNING.items():
        predictor = kind(facts)
        learn(predictor, learned, facts)
        found[name] = judge(predictor, held, facts, rows)
    return found | {"trained": judge(Trained(facts, arrays), held, facts, rows)}


def recall_table(found: "dict[str, list[Recall]]") -> str:
    """Return a table of predictors' recalls, with its legend."""
    lines = [f"{'predictor':<16} {'distance':>8} {'width':>6} {'recall':>7} {'precision':>9}"]
    for name, recalls in found.items():
        for r in recalls:
            lines.append(
                f"{name:<16} {r.distance:8} {r.width:6} {r.recall:7.1%} {r.precision:9.1%}"
            )
    return "\n".join(lines) + "\n" + LEGEND


def _print(
    arguments: argparse.Namespace, found: "dict[str, list[Recall]]", facts: dict[str, int]
) -> None:
    if arguments.json:
        predictors = {name: [r.as_dict() for r in recalls] for name, recalls in found.items()}
        saved = None if arguments.save is None else str(arguments.save)
        values = {**facts, "saved": saved, "predictors": predictors}
        sys.stdout.write(json.dumps(values, indent=1) + "\n")
        return
    sys.stdout.write("predicted " + " ".join(f"{n}={value}" for n, value in facts.items()) + "\n")
    sys.stdout.write(recall_table(found))
    if arguments.save is not None:
        sys.stdout.write(f"saved file={arguments.save}\n")
