"""``moeyard eval``: how good a model is on a text, or on lm-eval's tasks."""

import argparse
import json
import sys
from pathlib import Path

from .options import Parsers, add_command, add_loading, add_model, read_text


def add(parsers: Parsers) -> None:
    """Add the command."""
    evaluate = add_command(parsers, "eval", "measure a model's loss on a text, or lm-eval's tasks")
    add_model(evaluate)
    what = evaluate.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text to predict")
    what.add_argument(
        "--tasks", metavar="A,B", help="tasks of lm-eval, which pip install lm-eval brings"
    )
    evaluate.add_argument(
        "--length",
        type=int,
        metavar="N",
        help="tokens of a window of --text; default: that of the run's training, or the model's "
        "longest, at most 2048",
    )
    evaluate.add_argument("--limit", type=int, metavar="N", help="examples per task; default: all")
    evaluate.add_argument(
        "--include-path", type=Path, metavar="FOLDER", help="folder with tasks of your own"
    )
    evaluate.add_argument("--json", action="store_true", help="print JSON")
    add_loading(evaluate)
    evaluate.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print the figures."""
    text = None if arguments.text is None else read_text(arguments.text)
    if text is None:
        from ..serving.evaluation.lm_eval_bridge import check_lm_eval

        check_lm_eval()
    from .model_folder import open_model, trained_length

    model = open_model(arguments)
    if text is None:
        from ..serving.evaluation.lm_eval_bridge import run_tasks

        tasks = arguments.tasks.split(",")
        values = run_tasks(model, tasks, arguments.limit, arguments.include_path)
    else:
        from ..serving.evaluation.held_out_text import score_text

        length = arguments.length or trained_length(arguments.model)
        score = score_text(model, text, length)
        if model.decoder.core is not None:
            sys.stderr.write(
                "answers use core channels, so the first half of each window is read as a prompt "
                "and the second half is predicted.\n"
            )
        values = {
            "loss": score.loss,
            "perplexity": score.perplexity,
            "loss_per_byte": score.loss_per_byte,
            "bits_per_byte": score.bits_per_byte,
            "length": score.length,
            "tokens": score.tokens,
            "bytes": score.bytes,
        }
    if arguments.json:
        sys.stdout.write(json.dumps(values, indent=1) + "\n")
    else:
        facts = " ".join(f"{name}={_short(value)}" for name, value in values.items())
        sys.stdout.write(f"evaluated {facts}\n")


def _short(value: float) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
