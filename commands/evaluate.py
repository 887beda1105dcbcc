"""``moeyard eval``: how good a model is on a text, or on lm-eval's tasks."""

import argparse
import json
import sys
from pathlib import Path

from ..configuration import read_values
from ..errors import ConfigError
from .options import Parsers, add_command, add_loading, add_model, read_text


def add(parsers: Parsers) -> None:
    """Add the command."""
    evaluate = add_command(parsers, "eval", "measure a model's loss on a text, or lm-eval's tasks")
    add_model(evaluate)
    what = evaluate.add_mutually_exclusive_group()
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
    check_continues_text(arguments.model)
    if arguments.text is None and arguments.tasks is None:
        raise ConfigError("there is nothing to measure; give --text FILE or --tasks A,B.")
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


def check_continues_text(name: str) -> None:
    """Refuse a run of another kind of model, with what the run itself has measured."""
    from ..moe.config.kinds import kind_of
    from ..moe.config.model import ModelConfig

    run_dir = Path(name)
    if not (run_dir / "config.yaml").is_file():
        return
    kind = kind_of(read_values(run_dir / "config.yaml").get("model"))
    if kind is None or kind is ModelConfig:
        return
    own = kind.model_fields["kind"].default
    measures = _last_measures(run_dir / "metrics.jsonl")
    raise ConfigError(
        f"{name} has a model of kind {own}, which continues no text to measure it on; its run has "
        f"measured {measures or 'nothing yet'}, and moeyard report {name} shows it."
    )


def _last_measures(path: Path) -> str:
    """Return what the last evaluation in the records of a run has found."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except ValueError:  # a killed run may leave half a line
            continue
        found = [f"{k}={_short(v)}" for k, v in record.items() if k.startswith("eval_")]
        if found:
            return " ".join([*found, f"in step {record['step']}"])
    return ""


def _short(value: float) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
