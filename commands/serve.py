"""``moeyard serve``: a model behind an OpenAI API with Ray Serve."""

import argparse
import os
from pathlib import Path

from .options import (
    Parsers,
    add_adapters,
    add_allow_code,
    add_command,
    add_dtype,
    add_expert_store,
    add_ignore_unused_weights,
    add_kv_memory,
    add_model,
    report_errors,
)
from .speculation import add_speculation


def add(parsers: Parsers) -> None:
    """Add the command."""
    serve = add_command(parsers, "serve", "serve a model behind an OpenAI API with Ray Serve")
    add_model(serve)
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on")
    serve.add_argument("--port", type=int, default=8000, help="port to listen on")
    add_expert_store(serve)
    _add_memory_elsewhere(serve)
    _add_kv(serve)
    serve.add_argument("--served-model-name", help="name clients use; default: the folder's name")
    add_dtype(serve)
    serve.add_argument("--max-num-seqs", type=int, default=8, help="requests in the batch")
    serve.add_argument(
        "--max-queued-requests", type=int, default=64, help="requests that may wait; more get 429"
    )
    serve.add_argument(
        "--max-model-len",
        type=int,
        help="most tokens of prompt plus answer; default: what the model takes",
    )
    serve.add_argument(
        "--num-threads", type=int, help="compute threads per replica; default: its share of cores"
    )
    _add_scaling(serve)
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
        help="Jinja file, or name of one of the folder's templates; default: the folder's own",
    )
    _add_access(serve)
    add_speculation(serve)
    add_adapters(serve)
    _add_recording(serve)
    serve.add_argument(
        "--follow",
        metavar="DIR",
        help="take over what a run publishes into DIR (publish.folder) while requests run",
    )
    add_ignore_unused_weights(serve)
    add_allow_code(serve)
    serve.set_defaults(run=run)


def _add_memory_elsewhere(serve: argparse.ArgumentParser) -> None:
    """Add what holds experts outside the replica's own process."""
    serve.add_argument(
        "--host-memory",
        metavar="SIZE",
        help="memory of this machine for further experts, shared by the replicas: 8GiB or 50%% of "
        "all; default: 0",
    )
    serve.add_argument(
        "--expert-parallel",
        metavar="N",
        type=int,
        default=1,
        help="processes that share the experts of each replica, with --expert-memory for each; "
        "default: 1, the replica itself",
    )
    serve.add_argument(
        "--expert-placement",
        metavar="FILE",
        help="a plan of moeyard trace place, or recorded routes: which of them has which expert",
    )


def _add_kv(serve: argparse.ArgumentParser) -> None:
    add_kv_memory(serve)
    serve.add_argument(
        "--no-prefix-reuse",
        action="store_true",
        help="read every prompt whole, even where another request has read how it begins",
    )


def _add_access(serve: argparse.ArgumentParser) -> None:
    serve.add_argument(
        "--api-key",
        default=os.environ.get("MOEYARD_API_KEY"),
        help="key clients must send; default: $MOEYARD_API_KEY (not visible in ps), else none",
    )
    serve.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="web pages that may call the server, such as http://localhost:3000, or *; repeat for "
        "several; default: none",
    )


def _add_scaling(serve: argparse.ArgumentParser) -> None:
    serve.add_argument(
        "--replicas",
        dest="num_replicas",
        metavar="N",
        type=int,
        default=1,
        help="processes that serve the model",
    )
    serve.add_argument(
        "--max-replicas",
        metavar="N",
        type=int,
        help="replicas at busy times, one for each full batch of answers that run or wait; "
        "default: always as many as --replicas",
    )
    serve.add_argument(
        "--downscale-delay",
        metavar="SECONDS",
        type=float,
        default=120.0,
        help="time that fewer replicas must have been enough before one is taken away",
    )
    serve.add_argument(
        "--prefix-routing",
        action="store_true",
        help="send requests that begin alike to one replica, unless it is busier than others",
    )


def _add_recording(serve: argparse.ArgumentParser) -> None:
    serve.add_argument(
        "--record-routes",
        metavar="DIR",
        help="write which experts each token visited into DIR, a file for each replica",
    )


def run(arguments: argparse.Namespace) -> int:
    """Serve a model until told to stop; return the status."""
    from ..serving.cluster.guardian import run_guarded
    from ..serving.packages import check_packages

    check_packages()

    def start(attempt: int) -> int:
        from ..configuration import validate_config
        from ..serving.launch import serve_forever
        from ..serving.serve_args import ServeArgs
        from .model_folder import model_folder

        folder = model_folder(arguments.model)
        if folder != arguments.model:  # clients know the run's name, not the step's
            name = arguments.served_model_name or Path(arguments.model).resolve().name
            arguments.model, arguments.served_model_name = folder, name
        values = {
            name: value
            for name, value in vars(arguments).items()
            if name in ServeArgs.model_fields and value is not None
        }
        args = validate_config(ServeArgs, values)
        return serve_forever(args, arguments.host, arguments.port, attempt)

    return run_guarded(lambda attempt: report_errors(lambda: start(attempt)))
