"""Shared by the scripts of this folder: a server to try (a given one, or one that they start), a
client for it, and how they end."""

import argparse
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

sys.path.append(str(Path(__file__).parents[2] / "tests" / "serving"))
from small_model import write_random_model

START_S = 300
NEW_CONNECTIONS = httpx.Limits(max_keepalive_connections=0)
"""A server closes a connection on which something failed; who kept it would find it shut."""
KEY = "chaos-0a1b2c3d4e5f"
WITHOUT_RAY = """
import os, sys, uvicorn
from moeyard.serving.serve_args import ServeArgs
from moeyard.serving.server import Server
folder, key = sys.argv[1], os.environ["MOEYARD_API_KEY"]
options = {"model": f"{folder}/small", "chat_template": f"{folder}/chat.jinja", "num_threads": 1}
server = Server(ServeArgs(api_key=key, **options))
print("ready model=small", flush=True)
uvicorn.run(server.app(), host="127.0.0.1", port=int(sys.argv[2]))
"""
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "


@dataclass
class Target:
    """A server under test, and what was found out about it."""

    base: str
    key: str | None
    model: str = ""
    logs: list[Path] = field(default_factory=list)
    """Files and folders with all that the server has written; none for a server of others."""
    counts: Counter = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.key is None else {"Authorization": f"Bearer {self.key}"}

    @cached_property
    def client(self) -> httpx.Client:
        return httpx.Client(
            base_url=self.base, headers=self.headers, timeout=120, limits=NEW_CONNECTIONS
        )

    def fault(self, text: str) -> None:
        self.faults.append(text)
        print(f"FAULT {text[:1000]}", flush=True)

    def check_answer(self, what: str, answer: httpx.Response) -> None:
        """Count an answer; a 5xx and an error that is not OpenAI's object are faults."""
        self.counts[answer.status_code] += 1
        if answer.status_code >= 500:
            self.fault(f"{what}: {answer.status_code} {answer.text[:200]}")
        elif answer.status_code >= 400 and "HEAD" not in what:
            try:
                error = answer.json()["error"]
                is_whole = set(error) == {"message", "type", "param", "code"} and error["message"]
            except (ValueError, KeyError, TypeError):
                is_whole = False
            if not is_whole:
                self.fault(f"{what}: {answer.status_code} without OpenAI's error: {answer.text!r}")

    def show_counts(self, what: str) -> None:
        """Print how often each status came, and begin to count again."""
        counts = " ".join(f"{status}:{count}" for status, count in sorted(self.counts.items()))
        print(f"{what} {sum(self.counts.values())} by status {counts}", flush=True)
        self.counts.clear()

    def totals(self) -> dict[str, float]:
        """Return the server's metrics, summed over labels."""
        text = self.client.get("/metrics").raise_for_status().text
        totals: Counter = Counter()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                totals[sample.name] += sample.value
        return totals

    def check_alive(self) -> None:
        """See that the server still answers."""
        body = {"model": self.model, "prompt": "abc", "max_tokens": 4, "n": 2}
        health = self.client.get("/health")
        answer = self.client.post("/v1/completions", json=body)
        if (health.status_code, answer.status_code) != (200, 200):
            self.fault(f"afterwards: /health {health.status_code}, completion {answer.text[:200]}")


def arguments(description: str) -> argparse.ArgumentParser:
    """Return what all scripts take."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", nargs="?", metavar="BASE_URL", help="default: start a small server")
    parser.add_argument("--api-key", help="key of the server at BASE_URL")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--no-ray", action="store_true", help="serve the application alone")
    return parser


@contextlib.contextmanager
def target_of(given: argparse.Namespace) -> Iterator[Target]:
    """Yield the server that was given, or one that is started here and ended again."""
    if given.base is not None:
        target = Target(given.base.rstrip("/"), given.api_key)
        target.model = _model_of(target)
        yield target
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the server must not be left behind
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))  # short: Ray puts sockets there
    try:
        with _serve(folder, given.no_ray) as target:
            yield target
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def end(target: Target) -> None:
    """End the program, with 1 if there was a fault."""
    print("RESULT " + (f"{len(target.faults)} faults" if target.faults else "no fault"))
    sys.exit(1 if target.faults else 0)


@contextlib.contextmanager
def _serve(folder: Path, no_ray: bool) -> Iterator[Target]:
    write_random_model(folder / "small")
    (folder / "chat.jinja").write_text(TEMPLATE)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [Path(sys.executable).parent / "moeyard", "serve", folder / "small", "--num-threads"]
    command += ["1", "--port", str(port), "--chat-template", folder / "chat.jinja"]
    if no_ray:
        command = [sys.executable, "-c", WITHOUT_RAY, folder, str(port)]
    variables = {"RAY_TMPDIR": str(folder / "r"), "MOEYARD_API_KEY": KEY}
    log = folder / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            list(map(str, command)),
            env={**os.environ, **variables},
            cwd="/",
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + START_S
        while "ready model=" not in log.read_text():
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"the server did not start:\n{log.read_text()}")
            time.sleep(0.2)
        while no_ray and not _listens(port):
            time.sleep(0.1)
        yield Target(f"http://127.0.0.1:{port}", KEY, "small", [log, folder / "r"])
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(90)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _model_of(target: Target) -> str:
    models = target.client.get("/v1/models").raise_for_status().json()
    return str(models["data"][0]["id"])
