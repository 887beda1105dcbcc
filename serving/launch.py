"""``moeyard serve``: Ray and Ray Serve on this machine, on the loopback, until told to stop."""

import logging
import os
import secrets
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from types import FrameType

from ..errors import ConfigError, MoeyardError
from .proxy_guard import ask_for_guard
from .server import ServeArgs, check_model

START_TIMEOUT_S = 300.0
ENDING_TIMEOUT_S = 10.0
"""For the last events to reach clients whose requests are ended; the longest step counts too."""
HUB_TIMEOUT_S = 10.0
APPLICATION = "moeyard"
RAY_LOGS = "/tmp/ray/session_latest/logs/serve"


class _Stopped(Exception):  # noqa: N818
    """SIGINT or SIGTERM came."""


def serve_forever(args: ServeArgs, host: str, port: int) -> None:
    """Start the server, say when it is ready, and stop it on SIGINT or SIGTERM.

    What can be refused is refused before Ray starts.
    """
    check_address(host, port)
    check_model(args, runs_here=True)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray's own ports listen on every interface; a token keeps strangers out.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    ask_for_guard()
    is_ready = False
    try:
        _on_signals(_stop)
        import ray
        from ray import serve

        # "local": never join, and never shut down, a cluster that is already there.
        ray.init(
            address="local",
            # A replica asks Ray for one CPU; more of them than there are must not wait for ever.
            num_cpus=max(args.num_replicas, len(os.sched_getaffinity(0))),
            include_dashboard=False,
            logging_level=logging.WARNING,
            log_to_driver=False,
        )
        _on_signals(_stop)  # ray.init put handlers of its own in place
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        serve.start(http_options={"host": host, "port": port})
        _deploy(args)
        base = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        _wait_until_healthy(base)
        sys.stdout.write(f"ready model={args.model_name} url={base}/v1\n")
        sys.stdout.flush()
        is_ready = True
        while True:
            signal.pause()
    except (_Stopped, SystemExit):
        # SystemExit: the signal came while ray.init had its own handler in place.
        if is_ready:
            _drain(args.drain_timeout)
    finally:
        _on_signals(signal.SIG_IGN)  # shutting down is all that is left
        _shut_down()


def _drain(timeout_s: float) -> None:
    """Let nobody in, wait for what runs, end what is left; a second signal ends all at once."""
    import ray
    from ray.exceptions import RayError

    from .hub_actor import open_hub

    sys.stdout.write(f"draining timeout_s={timeout_s:g}; a second signal ends everything at once\n")
    sys.stdout.flush()
    try:
        hub = open_hub(APPLICATION)
        for stage, seconds in (("draining", timeout_s), ("ending", ENDING_TIMEOUT_S)):
            ray.get(hub.set_stage.remote(stage), timeout=HUB_TIMEOUT_S)
            deadline = time.monotonic() + seconds
            while not ray.get(hub.is_drained.remote(), timeout=HUB_TIMEOUT_S):
                if time.monotonic() > deadline:
                    break
                time.sleep(0.1)
            else:
                return
    except RayError as error:
        reason = type(error).__name__
        sys.stderr.write(f"running requests are ended: Ray does not answer ({reason}).\n")
    except _Stopped:
        _on_signals(signal.SIG_IGN)
        ray.shutdown()  # takes everything it started with it, without asking
        raise KeyboardInterrupt from None


def check_address(host: str, port: int) -> None:
    """Refuse a host or port that cannot be listened on."""
    if not 1 <= port <= 65535:
        raise ConfigError(f"port is {port}; use a number from 1 to 65535.")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ConfigError(f"host is {host!r}, which is unknown ({error.strerror}).") from None
    with socket.socket(family, kind) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            raise ConfigError(
                f"port {port} on {host} cannot be used ({error.strerror}); "
                "choose another with --port or --host."
            ) from None


def _deploy(args: ServeArgs) -> None:
    from ray import serve

    from .app import application

    try:
        serve.run(application(args), name=APPLICATION, route_prefix="/", blocking=False)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise MoeyardError(
            f"the server could not start ({reason}); the logs are in {RAY_LOGS}."
        ) from error


def _shut_down() -> None:
    import ray
    from ray import serve

    if ray.is_initialized():  # asking Serve would start a Ray otherwise
        serve.shutdown()
        ray.shutdown()


def _wait_until_healthy(base: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{base}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise MoeyardError(
        f"the server did not answer within {START_TIMEOUT_S:.0f} s; the logs are in {RAY_LOGS}."
    )


def _on_signals(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def _stop(_signal: int, _frame: FrameType | None) -> None:
    raise _Stopped
