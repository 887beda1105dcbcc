"""What each ``moeyard`` command does. Heavy imports wait until their command runs."""

import argparse
import sys
from collections.abc import Callable

from .errors import MoeyardError, Stopped


def report_errors(work: Callable[[], int | None]) -> int:
    """Do ``work``; print an error as one sentence and return the exit status."""
    try:
        status = work()
    except Stopped as stopped:
        sys.stderr.write(f"{stopped}\n")
        return 130
    except MoeyardError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2 if isinstance(error, ValueError) else 1
    except KeyboardInterrupt:
        return 130
    return status or 0


def run_export(arguments: argparse.Namespace) -> None:
    """Write a run's newest checkpoint as a Hugging Face folder."""
    from .moe.routers.own_code import allow
    from .training.checkpoints.export import export

    allow(arguments.allow_code)
    step = export(arguments.run_dir, arguments.out_dir)
    sys.stdout.write(f"exported step={step} folder={arguments.out_dir}\n")


def run_convert(arguments: argparse.Namespace) -> None:
    """Write a Hugging Face folder in another dtype."""
    from .moe.folders.convert import convert
    from .moe.routers.own_code import allow

    allow(arguments.allow_code)
    no_argument = ("run", "allow_code")
    given = {name: value for name, value in vars(arguments).items() if name not in no_argument}
    model_type = convert(**given)
    sys.stdout.write(f"converted folder={arguments.target} model_type={model_type}\n")


def run_upcycle(arguments: argparse.Namespace) -> None:
    """Write a dense folder as one with experts."""
    from .moe.folders.upcycle import upcycle

    given = {name: value for name, value in vars(arguments).items() if name != "run"}
    model_type = upcycle(**given)
    sys.stdout.write(f"upcycled folder={arguments.target} model_type={model_type}\n")


def run_tokenize(arguments: argparse.Namespace) -> None:
    """Write a tokenizer and token shards."""
    from .configuration import validate_config
    from .training.config import DataConfig
    from .training.data.tokenize import LEARNT_IDS, tokenize
    from .training.stop import StopRequest

    given = {name: value for name, value in vars(arguments).items() if value is not None}
    values = {name: value for name, value in given.items() if name in DataConfig.model_fields}
    config = validate_config(DataConfig, values)
    stop = StopRequest()
    stop.listen()
    vocab_size = given.get("vocab_size", None if "tokenizer" in given else LEARNT_IDS)
    found = tokenize(config, arguments.out_dir, vocab_size, arguments.chat_template, stop)
    sys.stdout.write(
        f"tokenized folder={arguments.out_dir} vocab_size={found.vocab_size} "
        f"train_tokens={found.train_tokens} eval_tokens={found.eval_tokens}\n"
    )


def run_report(arguments: argparse.Namespace) -> None:
    """Write the page of a run."""
    from .training.report.page import write_report

    path, damage = write_report(arguments.run_dir, arguments.out)
    if damage is not None:
        sys.stderr.write(f"warning: {damage}\n")
    sys.stdout.write(f"report file={path}\n")


def run_doctor(arguments: argparse.Namespace) -> int:
    """Return 1 when a backend fails its self-check."""
    import json

    from .doctor import as_json, as_text, examine

    facts, checks = examine()
    text = json.dumps(as_json(facts, checks), indent=1) + "\n"
    sys.stdout.write(text if arguments.json else as_text(facts, checks))
    return 1 if any(check.failed for check in checks) else 0


def run_serve(arguments: argparse.Namespace) -> int:
    """Serve a model until told to stop; return the status."""
    from .serving.cluster.guardian import run_guarded
    from .serving.packages import check_packages

    check_packages()

    def start(attempt: int) -> int:
        from .configuration import validate_config
        from .serving.launch import serve_forever
        from .serving.server import ServeArgs

        values = {
            name: value
            for name, value in vars(arguments).items()
            if name in ServeArgs.model_fields and value is not None
        }
        args = validate_config(ServeArgs, values)
        return serve_forever(args, arguments.host, arguments.port, attempt)

    return run_guarded(lambda attempt: report_errors(lambda: start(attempt)))
