"""``moeyard serve``: Ray and Ray Serve on this machine, on the loopback, until told to stop."""

import contextlib
import json
import logging
import os
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from ..errors import ConfigError, MoeyardError
from .cluster.guardian import ATTEMPTS, TRY_AGAIN, stopping_signals
from .cluster.own_ray import RayStartError, StartReport, Watch, prepare, start
from .experts.budget import parse_budget
from .experts.tiers.shared_memory import object_store_bytes
from .hosting import check_model
from .planning.start import show_start
from .proxy_guard import UNFINISHED
from .serve_args import ServeArgs
from .server import with_commit
from .server_budgets import log_budgets, with_budgets

START_TIMEOUT_S = 300.0
ENDING_TIMEOUT_S = 10.0
"""Time for last events to reach clients whose requests are ended, including the longest step."""
HUB_TIMEOUT_S = 10.0
APPLICATION = "moeyard"


class _Stopped(Exception):  # noqa: N818
    """SIGINT, SIGTERM or SIGHUP came."""


def serve_forever(args: ServeArgs, host: str, port: int, attempt: int) -> int:
    """Start the server, say when it is ready, and stop it when a signal comes; return a status.

    What can be refused is refused before Ray starts. Where Ray fails on the way, the status is
    :data:`TRY_AGAIN`, unless this is the last attempt. Runs under the guardian, which ends every
    process that is still there afterwards.
    """
    check_address(host, port)
    args, room = with_budgets(with_commit(args))
    check_model(args, runs_here=True)
    if attempt == 1:
        show_start()
        log_budgets(args, room)
    report = StartReport(args.model_name, attempt)
    folder = prepare()
    is_ready = False

    def end_without_ray(name: str) -> None:
        # Any call of Ray's library would wait for the process that has died.
        reason = f"Ray's {name} has ended"
        if is_ready:
            sys.stderr.write(f"error: {reason}, so the server stops; its logs are in {folder}.\n")
        status = 1 if is_ready else _failed_start(reason, folder, attempt)
        sys.stderr.flush()
        os._exit(status)

    watch = Watch(end_without_ray)
    try:
        _on_signals(_stop)
        base = _start(args, host, port, folder, report)
        report.close()
        sys.stdout.write(f"ready model={args.model_name} url={base}/v1\n")
        sys.stdout.flush()
        is_ready = True
        _keep_spare()
        while True:
            signal.pause()
    except RayStartError as error:
        return _failed_start(str(error), folder, attempt)
    except (_Stopped, SystemExit):
        # SystemExit: the signal came while ray.init had its own handler in place.
        report.close()
        if is_ready:
            _drain(args.drain_timeout, base)
        return 0
    finally:
        _on_signals(signal.SIG_IGN)  # shutting down is all that is left
        watch.close()
        _shut_down()


def _start(args: ServeArgs, host: str, port: int, folder: Path, report: StartReport) -> str:
    """Start everything and return the address once it answers."""
    # A replica asks Ray for one CPU; more of them than there are must not wait for ever.
    copies = parse_budget(args.host_memory, 0) if args.host_memory else 0
    cpus = max(args.most_replicas, len(os.sched_getaffinity(0)))
    start(folder, cpus, object_store_bytes(copies) if copies else None)
    _on_signals(_stop)  # ray.init has replaced them
    from ray import serve
    from ray.exceptions import RayError

    report.waits_for = "ray_serve"
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        serve.start(http_options={"host": host, "port": port})
    except (RayError, RuntimeError, TimeoutError) as error:
        raise RayStartError(f"Ray Serve did not start ({type(error).__name__})") from error
    report.waits_for = "model"
    _deploy(args, folder)
    base = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    _wait_until_healthy(base, folder)
    return base


def _failed_start(reason: str, folder: Path, attempt: int) -> int:
    """Say that an attempt failed and return the status that asks for the next, if there is one."""
    if attempt < ATTEMPTS:
        sys.stdout.write(f"starting_again attempt={attempt + 1} reason={json.dumps(reason)}\n")
        sys.stdout.flush()
        return TRY_AGAIN
    sys.stderr.write(
        f"error: {reason} in the last of {attempt} attempts; the machine may be too busy or short "
        f"of memory, so try again when it is not; Ray's logs are in {folder}/session_latest/logs.\n"
    )
    return 1


def _drain(timeout_s: float, base: str) -> None:
    """Refuse new requests, wait for running ones, end the rest; a second signal ends all now."""
    import ray
    from ray.exceptions import RayError

    from .replicas.hub_actor import open_hub

    sys.stdout.write(f"draining timeout_s={timeout_s:g}; a second signal ends everything now\n")
    sys.stdout.flush()
    try:
        hub = open_hub(APPLICATION)
        for stage, seconds in (("draining", timeout_s), ("ending", ENDING_TIMEOUT_S)):
            ray.get(hub.set_stage.remote(stage), timeout=HUB_TIMEOUT_S)
            deadline = time.monotonic() + seconds
            while not ray.get(hub.is_drained.remote(), timeout=HUB_TIMEOUT_S):
                if time.monotonic() > deadline:
                    break
                time.sleep(0.05)
            else:
                break
        _wait_for_clients(base, time.monotonic() + ENDING_TIMEOUT_S)
    except RayError as error:
        reason = type(error).__name__
        sys.stderr.write(f"running requests are ended: Ray does not answer ({reason}).\n")
    except _Stopped:
        raise KeyboardInterrupt from None


def _wait_for_clients(base: str, deadline: float) -> None:
    """Wait until Ray's proxy has handed over all that the replicas said."""
    request = urllib.request.Request(f"{base}{UNFINISHED}")
    request.add_header("Authorization", f"Bearer {os.environ['RAY_AUTH_TOKEN']}")
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                if json.load(answer)["unfinished"] == 0:
                    return
        except (OSError, ValueError):
            return  # the proxy is gone, so nothing is left to wait for
        time.sleep(0.05)


def check_address(host: str, port: int) -> None:
    """Refuse a host or port that cannot be listened on."""
    if not 1 <= port <= 65535:
        raise ConfigError(f"port is {port}; use a number from 1 to 65535.")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ConfigError(
            f"host is {host!r}, which is unknown ({error.strerror}); choose another."
        ) from None
    with socket.socket(family, kind) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            raise ConfigError(
                f"port {port} on {host} cannot be used ({error.strerror}); "
                "choose another with --port or --host."
            ) from None


def _deploy(args: ServeArgs, folder: Path) -> None:
    from ray import serve

    from .app import application

    try:
        serve.run(application(args), name=APPLICATION, route_prefix="/", blocking=False)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise MoeyardError(
            f"the server could not start ({reason}); the logs are in {_serve_logs(folder)}."
        ) from error


def _keep_spare() -> None:
    """Keep a worker ready for the next replica."""
    from .cluster.spare_worker import SpareWorker

    SpareWorker()


def _shut_down() -> None:
    """End Ray on systems without the guardian, which is quicker and prints nothing."""
    if sys.platform != "linux":
        import ray

        ray.shutdown()


def _wait_until_healthy(base: str, folder: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        with contextlib.suppress(urllib.error.URLError, OSError):
            urllib.request.urlopen(f"{base}/health", timeout=5).close()
            return
        time.sleep(0.2)
    raise MoeyardError(
        f"the server did not answer within {START_TIMEOUT_S:.0f} s; "
        f"the logs are in {_serve_logs(folder)}."
    )


def _serve_logs(folder: Path) -> Path:
    return folder / "session_latest" / "logs" / "serve"


def _on_signals(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    for number in stopping_signals():
        signal.signal(number, handler)


def _stop(_signal: int, _frame: FrameType | None) -> None:
    raise _Stopped
