"""``moeyard serve``: Ray and Ray Serve on this machine, on the loopback, until told to stop."""

import logging
import os
import secrets
import signal
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

from ..errors import ConfigError, ModelFileError, MoeyardError
from ..moe.model_folder import ModelFolder
from .loading import open_store, pick_dtype
from .server import ServeArgs, open_serving_tokenizer

START_TIMEOUT_S = 300.0
RAY_LOGS = "/tmp/ray/session_latest/logs/serve"


def serve_forever(args: ServeArgs, host: str, port: int) -> None:
    """Start the server, say when it is ready, and stop it on SIGINT or SIGTERM.

    What can be refused is refused before Ray starts.
    """
    check_before_start(args, host, port)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray's own ports listen on every interface; a token keeps strangers out.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import ray
    from ray import serve

    from .app import build

    stopped = threading.Event()
    ray.init(include_dashboard=False, logging_level=logging.WARNING, log_to_driver=False)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    try:
        serve.start(http_options={"host": host, "port": port})
        try:
            serve.run(build(args), name="moeyard", route_prefix="/", blocking=False)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise MoeyardError(
                f"the server could not start ({reason}); the logs are in {RAY_LOGS}."
            ) from error
        wait_until_healthy(host, port, stopped)
        if not stopped.is_set():
            sys.stdout.write(f"ready model={args.model_name} url=http://{host}:{port}/v1\n")
            sys.stdout.flush()
        stopped.wait()
    finally:
        serve.shutdown()
        ray.shutdown()


def check_before_start(args: ServeArgs, host: str, port: int) -> None:
    """Refuse an occupied port, a broken folder or a budget that cannot work."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"port {port} on {host} cannot be used ({error.strerror}); "
                "choose another with --port."
            ) from None
    folder = ModelFolder(Path(args.model))
    folder.check_experts()
    open_serving_tokenizer(Path(args.model))
    if args.expert_memory is not None:
        open_store(folder, pick_dtype(folder, args.dtype), args.expert_memory).close()
    folder.close()
    longest = folder.config.max_positions
    if args.max_model_len is not None and args.max_model_len > longest:
        raise ModelFileError(
            f"max-model-len is {args.max_model_len}, but the model takes {longest}; lower it."
        )


def wait_until_healthy(host: str, port: int, stopped: threading.Event) -> None:
    """Wait for ``/health`` to answer."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while not stopped.is_set() and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://{host}:{port}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            stopped.wait(0.2)
