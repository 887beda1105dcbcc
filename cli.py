"""The ``moeyard`` command."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from . import __version__
from .errors import MoeyardError, Stopped


def main(argv: list[str] | None = None) -> int:
    """Run the command; return 0 when done, 1 failed, 2 for bad input, 130 when interrupted."""
    arguments = build_parser().parse_args(argv)
    return _report_errors(lambda: arguments.run(arguments))


def _report_errors(work: Callable[[], int | None]) -> int:
    """Do ``work`` and turn what it raises into a sentence and a status."""
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


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        prog="moeyard", description="Sparse Mixture-of-Experts models."
    )
    parser.add_argument("--version", action="version", version=f"moeyard {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    export = commands.add_parser("export", help="training checkpoint to Hugging Face folder")
    export.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    export.add_argument("out_dir", type=Path, metavar="OUT_DIR")
    export.set_defaults(run=_export)

    convert = commands.add_parser("convert", help="Hugging Face folder to one of another type")
    convert.add_argument("source", type=Path, metavar="SRC")
    convert.add_argument("target", type=Path, metavar="DST")
    convert.add_argument(
        "--dtype",
        choices=("fp32", "bf16", "int8", "int4"),
        help="of the weights; int8 and int4 are for routed experts; default as stored",
    )
    convert.add_argument(
        "--ignore-unused-weights",
        action="store_true",
        help="do without weights that config.json does not ask for",
    )
    convert.set_defaults(run=_convert)

    upcycle = commands.add_parser("upcycle", help="dense Hugging Face folder to one with experts")
    upcycle.add_argument("source", type=Path, metavar="SRC")
    upcycle.add_argument("target", type=Path, metavar="DST")
    upcycle.add_argument("--num-experts", type=int, required=True, help="experts of a layer")
    upcycle.add_argument("--k", type=int, required=True, help="experts each token visits")
    upcycle.add_argument(
        "--split", type=int, default=1, help="slices of the dense MLP, an expert each; default 1"
    )
    upcycle.add_argument("--moe-layers", choices=("all", "every-2", "last-half"), default="all")
    upcycle.add_argument("--seed", type=int, default=0, help="of the new routers")
    upcycle.add_argument(
        "--ignore-unused-weights",
        action="store_true",
        help="do without weights that config.json does not ask for",
    )
    upcycle.set_defaults(run=_upcycle)

    tokenize = commands.add_parser("tokenize", help="text to a tokenizer and token shards")
    tokenize.add_argument(
        "source",
        metavar="SOURCE",
        help="stdlib, a text, .jsonl or .json file, a folder of these, or hf:NAME_OR_PATH",
    )
    tokenize.add_argument("out_dir", type=Path, metavar="OUT_DIR")
    which = tokenize.add_mutually_exclusive_group()
    which.add_argument("--vocab-size", type=int, help="learn a byte-level BPE; default 8192 ids")
    which.add_argument("--tokenizer", help="bytes or a Hugging Face folder, instead of learning")
    tokenize.add_argument("--eval-fraction", type=float, help="share held out; default 0.05")
    tokenize.add_argument("--eval-source", help="held-out text of its own, a source like SOURCE")
    tokenize.add_argument("--text-key", help="key or column of the text; default text")
    tokenize.add_argument("--hf-config", help="configuration of an hf: data set")
    tokenize.add_argument("--hf-revision", help="commit of an hf: data set")
    tokenize.add_argument("--split", help="split of an hf: data set; default train")
    tokenize.add_argument("--eval-split", help="held-out split of an hf: data set")
    tokenize.add_argument("--chat-template", type=Path, help="Jinja file to keep beside the BPE")
    tokenize.set_defaults(run=_tokenize)

    report = commands.add_parser("report", help="one HTML page about a training run")
    report.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    report.add_argument("-o", "--out", type=Path, help="default RUN_DIR/report.html")
    report.set_defaults(run=_report)

    doctor = commands.add_parser("doctor", help="what this machine has, which backends pass")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(run=_doctor)

    serve = commands.add_parser("serve", help="serve a model behind an OpenAI API with Ray Serve")
    serve.add_argument("model", metavar="MODEL_DIR")
    serve.add_argument("--host", default="127.0.0.1")
    serve.add_argument("--port", type=int, default=8000)
    serve.add_argument("--expert-memory", help="experts kept in memory: 2GiB or 25%%; default all")
    serve.add_argument("--served-model-name", help="name clients use; default the folder's name")
    serve.add_argument("--dtype", choices=("float32", "bfloat16"), help="default as stored")
    serve.add_argument("--max-num-seqs", type=int, default=8, help="requests in the batch")
    serve.add_argument(
        "--max-queued-requests", type=int, default=64, help="requests that may wait; 429 beyond"
    )
    serve.add_argument("--max-model-len", type=int, help="longest prompt and answer together")
    serve.add_argument(
        "--num-threads", type=int, help="compute threads of a replica; default its share of cores"
    )
    serve.add_argument(
        "--replicas",
        dest="num_replicas",
        metavar="N",
        type=int,
        default=1,
        help="processes that serve the model",
    )
    serve.add_argument(
        "--drain-timeout",
        metavar="SECONDS",
        type=float,
        default=30.0,
        help="time for running requests to finish when the server stops",
    )
    serve.add_argument(
        "--chat-template",
        metavar="FILE|NAME",
        help="Jinja file, or one of the model folder's templates by name; default the folder's",
    )
    serve.add_argument(
        "--api-key",
        default=os.environ.get("MOEYARD_API_KEY"),
        help="key clients must send; default $MOEYARD_API_KEY, which ps does not show, or none",
    )
    serve.add_argument(
        "--ignore-unused-weights",
        action="store_true",
        help="do without weights that config.json does not ask for",
    )
    serve.set_defaults(run=_serve)
    return parser


def _export(arguments: argparse.Namespace) -> None:
    from .training.checkpoints.export import export

    step = export(arguments.run_dir, arguments.out_dir)
    sys.stdout.write(f"exported step={step} folder={arguments.out_dir}\n")


def _convert(arguments: argparse.Namespace) -> None:
    from .moe.folders.convert import convert

    given = {name: value for name, value in vars(arguments).items() if name != "run"}
    model_type = convert(**given)
    sys.stdout.write(f"converted folder={arguments.target} model_type={model_type}\n")


def _upcycle(arguments: argparse.Namespace) -> None:
    from .moe.folders.upcycle import upcycle

    given = {name: value for name, value in vars(arguments).items() if name != "run"}
    model_type = upcycle(**given)
    sys.stdout.write(f"upcycled folder={arguments.target} model_type={model_type}\n")


def _tokenize(arguments: argparse.Namespace) -> None:
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


def _report(arguments: argparse.Namespace) -> None:
    from .training.report.page import write_report

    path, damage = write_report(arguments.run_dir, arguments.out)
    if damage is not None:
        sys.stderr.write(f"warning: {damage}\n")
    sys.stdout.write(f"report file={path}\n")


def _doctor(arguments: argparse.Namespace) -> int:
    """Return 1 when a backend fails its self-check."""
    import json

    from .doctor import as_json, as_text, examine

    facts, checks = examine()
    text = json.dumps(as_json(facts, checks), indent=1) + "\n"
    sys.stdout.write(text if arguments.json else as_text(facts, checks))
    return 1 if any(check.failed for check in checks) else 0


def _serve(arguments: argparse.Namespace) -> int:
    from .serving.cluster.guardian import run_guarded

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

    return run_guarded(lambda attempt: _report_errors(lambda: start(attempt)))


if __name__ == "__main__":
    sys.exit(main())
