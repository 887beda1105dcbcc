"""The ``moeyard`` command."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from . import __version__, commands
from .commands import report_errors
from .dtypes import short_name
from .system import stop_unless_it_can_run

if TYPE_CHECKING:
    Parsers = argparse._SubParsersAction[argparse.ArgumentParser]


def main(argv: list[str] | None = None) -> int:
    """Run the command; return 0 when done, 1 failed, 2 for bad input, 130 when interrupted."""
    stop_unless_it_can_run()
    arguments = build_parser().parse_args(argv)
    return report_errors(lambda: arguments.run(arguments))


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        prog="moeyard", description="Sparse Mixture-of-Experts models."
    )
    parser.add_argument("--version", action="version", version=f"moeyard {__version__}")
    parsers = parser.add_subparsers(required=True, metavar="COMMAND")

    _add_export(parsers)
    _add_convert(parsers)
    _add_upcycle(parsers)
    _add_tokenize(parsers)
    _add_report(parsers)
    _add_doctor(parsers)
    _add_serve(parsers)
    return parser


def _add_export(parsers: "Parsers") -> None:
    export = parsers.add_parser(
        "export", help="write a run's last checkpoint as a Hugging Face folder"
    )
    export.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    export.add_argument("out_dir", type=Path, metavar="OUT_DIR")
    _add_allow_code(export)
    export.set_defaults(run=commands.run_export)


def _add_convert(parsers: "Parsers") -> None:
    convert = parsers.add_parser("convert", help="write a Hugging Face folder in another dtype")
    convert.add_argument("source", type=Path, metavar="SRC")
    convert.add_argument("target", type=Path, metavar="DST")
    convert.add_argument(
        "--dtype",
        type=short_name,
        choices=("fp32", "bf16", "int8", "int4"),
        help="of the weights; torch's float32 and bfloat16 work, too; int8 and int4 apply to "
        "routed experts; default: as stored",
    )
    _add_ignore_unused_weights(convert)
    _add_allow_code(convert)
    convert.set_defaults(run=commands.run_convert)


def _add_upcycle(parsers: "Parsers") -> None:
    upcycle = parsers.add_parser(
        "upcycle", help="write a dense Hugging Face folder as one with experts"
    )
    upcycle.add_argument("source", type=Path, metavar="SRC")
    upcycle.add_argument("target", type=Path, metavar="DST")
    upcycle.add_argument("--num-experts", type=int, required=True, help="experts per layer")
    upcycle.add_argument("--k", type=int, required=True, help="experts each token visits")
    upcycle.add_argument(
        "--split", type=int, default=1, help="slices of the dense MLP, one expert each; default: 1"
    )
    upcycle.add_argument("--moe-layers", choices=("all", "every-2", "last-half"), default="all")
    upcycle.add_argument("--seed", type=int, default=0, help="seed of the new routers; default: 0")
    _add_ignore_unused_weights(upcycle)
    upcycle.set_defaults(run=commands.run_upcycle)


def _add_tokenize(parsers: "Parsers") -> None:
    tokenize = parsers.add_parser("tokenize", help="make a tokenizer and token shards from text")
    tokenize.add_argument(
        "source",
        metavar="SOURCE",
        help="stdlib, a text, .jsonl or .json file, a folder of these, or hf:NAME_OR_PATH",
    )
    tokenize.add_argument("out_dir", type=Path, metavar="OUT_DIR")
    which = tokenize.add_mutually_exclusive_group()
    which.add_argument(
        "--vocab-size", type=int, help="ids of the byte-level BPE to learn; default: 8192"
    )
    which.add_argument("--tokenizer", help="use 'bytes' or a Hugging Face folder instead")
    tokenize.add_argument("--eval-fraction", type=float, help="share held out; default: 0.05")
    tokenize.add_argument(
        "--eval-source", help="separate source of held-out text; same kinds as SOURCE"
    )
    tokenize.add_argument("--text-key", help="key or column of the text; default: text")
    tokenize.add_argument("--hf-config", help="configuration of an hf: data set")
    tokenize.add_argument("--hf-revision", help="commit of an hf: data set")
    tokenize.add_argument("--split", help="split of an hf: data set; default: train")
    tokenize.add_argument("--eval-split", help="held-out split of an hf: data set")
    tokenize.add_argument(
        "--chat-template", type=Path, help="Jinja file to save with the tokenizer"
    )
    tokenize.set_defaults(run=commands.run_tokenize)


def _add_report(parsers: "Parsers") -> None:
    report = parsers.add_parser("report", help="write an HTML page about a training run")
    report.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    report.add_argument(
        "-o", "--out", type=Path, help="file to write; default: RUN_DIR/report.html"
    )
    report.set_defaults(run=commands.run_report)


def _add_doctor(parsers: "Parsers") -> None:
    doctor = parsers.add_parser("doctor", help="show what this machine has and which backends pass")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(run=commands.run_doctor)


def _add_serve(parsers: "Parsers") -> None:
    serve = parsers.add_parser("serve", help="serve a model behind an OpenAI API with Ray Serve")
    serve.add_argument("model", metavar="MODEL", help="a model folder, or OWNER/MODEL of the hub")
    serve.add_argument("--host", default="127.0.0.1")
    serve.add_argument("--port", type=int, default=8000)
    serve.add_argument("--expert-memory", help="memory for experts: 2GiB or 25%%; default: all")
    serve.add_argument("--served-model-name", help="name clients use; default: the folder's name")
    serve.add_argument(
        "--dtype",
        type=short_name,
        choices=("fp32", "bf16"),
        help="float32 and bfloat16 work, too; default: as stored",
    )
    serve.add_argument("--max-num-seqs", type=int, default=8, help="batch size; default: 8")
    serve.add_argument(
        "--max-queued-requests", type=int, default=64, help="requests that may wait; more get 429"
    )
    serve.add_argument("--max-model-len", type=int, help="most tokens of prompt plus answer")
    serve.add_argument(
        "--num-threads", type=int, help="compute threads per replica; default: its share of cores"
    )
    serve.add_argument(
        "--replicas",
        dest="num_replicas",
        metavar="N",
        type=int,
        default=1,
        help="processes that serve the model; default: 1",
    )
    serve.add_argument(
        "--drain-timeout",
        metavar="SECONDS",
        type=float,
        default=30.0,
        help="time for running requests to finish when the server stops; default: 30",
    )
    serve.add_argument(
        "--chat-template",
        metavar="FILE|NAME",
        help="Jinja file, or name of one of the folder's templates; default: the folder's own",
    )
    serve.add_argument(
        "--api-key",
        default=os.environ.get("MOEYARD_API_KEY"),
        help="key clients must send; default: $MOEYARD_API_KEY (not visible in ps), else none",
    )
    _add_ignore_unused_weights(serve)
    _add_allow_code(serve)
    serve.set_defaults(run=commands.run_serve)


def _add_ignore_unused_weights(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ignore-unused-weights",
        action="store_true",
        help="skip weights that config.json does not ask for, instead of refusing the folder",
    )


def _add_allow_code(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow-code",
        action="append",
        default=[],
        metavar="MODULE",
        help="permit and import your own module with routers; repeat for several modules",
    )


if __name__ == "__main__":
    sys.exit(main())
