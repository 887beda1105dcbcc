"""What benchmarks of a whole server share: the server itself, and a client that counts."""

import asyncio
import contextlib
import json
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import aiohttp

sys.path.append(str(Path(__file__).parents[1] / "tests" / "serving"))
from server_process import BIN, Running, free_port

BATCH, QUEUE = 8, 64
"""--max-num-seqs and --max-queued-requests, as they are by default."""


@contextlib.contextmanager
def served(model: Path, replicas: int, *options: str) -> Iterator[Running]:
    """Serve a model folder with Ray's files in a separate folder; end everything afterwards."""
    with tempfile.TemporaryDirectory(prefix="bed-") as folder:  # short: Ray puts sockets there
        command = [str(BIN / "moeyard"), "serve", str(model), "--replicas", str(replicas)]
        port = free_port()
        command += ["--num-threads", "1", "--port", str(port), *options]
        running = Running(command, Path(folder) / "log", port, RAY_TMPDIR=folder)
        try:
            running.wait_until_ready()
            yield running
        finally:
            running.process.kill()
            running.process.wait()
            running.end()


def is_written(running: Running, who: str, pattern: str, since: float) -> float | None:
    """Return when Ray Serve's ``who`` first wrote a matching line after ``since``, or None."""
    found = []
    folder = running.log_path.parent / "ray" / "session_latest" / "logs" / "serve"
    for path in folder.glob(f"{who}_*.log"):
        for line in path.read_text(errors="replace").splitlines():
            stamp = re.match(r"\w+ (\S+ \S+) ", line)
            if stamp is None or not re.search(pattern, line):
                continue
            written = datetime.strptime(stamp[1], "%Y-%m-%d %H:%M:%S,%f").timestamp()
            if written >= since:
                found.append(written)
    return min(found, default=None)


def percentile(values: list[float], share: float) -> float:
    """Return the value that ``share`` of all do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


@dataclass
class Tally:
    """How requests ended, and how long each kind took."""

    counts: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def add(self, outcome: str, seconds: float) -> None:
        self.counts[outcome] += 1
        self.seconds.setdefault(outcome, []).append(seconds)

    def lines(self) -> list[str]:
        """Return a line for each outcome."""
        found = []
        for outcome, count in sorted(self.counts.items()):
            took = [1000 * percentile(self.seconds[outcome], share) for share in (0.5, 0.99, 1)]
            found.append(f"  {outcome:<34}{count:>7}  p50 {took[0]:7.0f} ms  p99 {took[1]:7.0f} ms")
            found[-1] += f"  max {took[2]:7.0f} ms"
        return found


class Client:
    """Completions of one server over connections that are kept."""

    def __init__(self, base: str, model: str) -> None:
        self._url, self._model = f"{base}/v1/completions", model
        self.session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=300, sock_connect=30),
        )

    def body(self, number: int, tokens: int, **more: object) -> dict[str, object]:
        """Return a request that always has as many tokens to make."""
        own = {"model": self._model, "prompt": f"hello {number}", "max_tokens": tokens}
        return {**own, "ignore_eos": True, "temperature": 0, **more}

    async def whole(self, number: int, tokens: int) -> str:
        """Send a request once; return its status, or how it was lost."""
        try:
            async with self.session.post(self._url, json=self.body(number, tokens)) as answer:
                content = await answer.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            return f"lost ({type(error).__name__})"
        if answer.status == 200 and json.loads(content)["usage"]["completion_tokens"] != tokens:
            return "200 but not whole"
        if answer.status in (429, 503) and "Retry-After" not in answer.headers:
            return f"{answer.status} without Retry-After"
        return str(answer.status)

    async def stream(self, number: int, tokens: int, leave_after: int | None = None) -> str:
        """Read a stream to its end, or leave after some events; return how it ended."""
        events: list[str] = []
        body = self.body(number, tokens, stream=True)
        try:
            async with self.session.post(self._url, json=body) as answer:
                if answer.status != 200:
                    return str(answer.status)
                async for line in answer.content:
                    if line.strip():
                        events.append(line.decode().strip().removeprefix("data: "))
                    if leave_after is not None and len(events) >= leave_after:
                        answer.close()
                        return "left"
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            return f"cut in silence ({type(error).__name__})"
        if not events or events[-1] != "[DONE]":
            return "cut in silence"
        return "ended in an error event" if '"error"' in events[-2] else "whole"


async def after(seconds: float, stop: asyncio.Event) -> bool:
    """Wait for ``seconds`` or until ``stop``; return whether to stop."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(stop.wait(), seconds)
    return stop.is_set()


def wait_for_zero(running: Running, seconds: float = 30.0) -> dict[str, float]:
    """Return the gauges of requests that are not at 0 after at most ``seconds``."""
    deadline = time.monotonic() + seconds
    while True:
        totals = running.totals()
        names = ("moeyard_requests_running", "moeyard_requests_waiting")
        left = {name: totals[name] for name in names if totals[name] != 0}
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.2)
