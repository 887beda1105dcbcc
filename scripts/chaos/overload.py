"""Does a server with twice the requests that it takes lose any, or stop answering?

    python scripts/chaos/overload.py [SECONDS]

Twice as many clients as batch and queue hold, each with a separate socket, ask again immediately
after any answer. Every request must end in a whole answer or in 429 with Retry-After, every
health check meanwhile in 200, and in the end no request may run or wait.
"""

import asyncio
import json
import random
import sys
import time
from collections import Counter

from verdict import Verdict
from with_server import read, served, wait_for

SEED = 7
PLACES = 8 + 64
CLIENTS = 2 * PLACES


async def exchange(port: int, method: str, path: str, body: bytes = b"") -> tuple[int, dict, bytes]:
    """Send a request over a new connection; return status, headers and the whole body."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        head = f"{method} {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()
        head, _, content = (await reader.read()).partition(b"\r\n\r\n")
    finally:
        writer.close()
    first, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    if len(content) != int(headers["content-length"]):
        raise ValueError("the body is not whole")
    return int(first.split()[1]), headers, content


class Overload:
    """The clients, and what became of their requests."""

    def __init__(self, port: int, seconds: float) -> None:
        self._port = port
        self._random = random.Random(SEED)
        self._ends = time.monotonic() + seconds
        self.outcomes: Counter[str] = Counter()
        self.seconds: dict[str, list[float]] = {"200": [], "429": [], "health": []}

    async def run(self) -> None:
        await asyncio.gather(self._probe(), *(self._client() for _ in range(CLIENTS)))

    async def _client(self) -> None:
        while time.monotonic() < self._ends:
            values = {"model": "long", "prompt": f"hello {self._random.randrange(100)}"}
            body = json.dumps({**values, "max_tokens": 32, "temperature": 0}).encode()
            started = time.monotonic()
            try:
                status, headers, content = await exchange(
                    self._port, "POST", "/v1/completions", body
                )
                outcome = str(status)
                if status == 200 and json.loads(content)["choices"][0]["finish_reason"] is None:
                    outcome = "200 without an end"
                if status == 429 and int(headers.get("retry-after", 0)) < 1:
                    outcome = "429 without Retry-After"
            except (OSError, ValueError, KeyError) as error:
                outcome = f"lost: {error!r}"
            self.outcomes[outcome] += 1
            self.seconds.setdefault(outcome, []).append(time.monotonic() - started)

    async def _probe(self) -> None:
        while time.monotonic() < self._ends:
            started = time.monotonic()
            try:
                status, _, _ = await exchange(self._port, "GET", "/health")
            except (OSError, ValueError, KeyError) as error:
                status = repr(error)
            self.outcomes[f"health {status}"] += 1
            self.seconds["health"].append(time.monotonic() - started)
            await asyncio.sleep(0.25)


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
    verdict = Verdict()
    verdict.say(f"seed {SEED}: {CLIENTS} clients, {PLACES} places, {seconds:.0f} s")
    with served() as running:
        load = Overload(running.port, seconds)
        asyncio.run(load.run())
        for outcome, count in sorted(load.outcomes.items()):
            verdict.say(f"     {outcome:<40}{count:>8}")
        for name, found in load.seconds.items():
            if found:
                found.sort()
                p50, p99 = found[len(found) // 2], found[int(len(found) * 0.99)]
                verdict.say(
                    f"     {name:<12} p50 {p50:.3f} s  p99 {p99:.3f} s  max {found[-1]:.3f} s"
                )
        wrong = {what for what in load.outcomes if what not in ("200", "429", "health 200")}
        verdict.check("every request ended in 200, or 429 with Retry-After", not wrong, wrong or "")
        verdict.check("there was an overload", load.outcomes["429"] > 0 < load.outcomes["200"])

        def is_idle() -> bool:
            totals = running.totals()
            return totals["moeyard_requests_running"] == 0 == totals["moeyard_requests_waiting"]

        took = wait_for(is_idle, 30)
        verdict.check("nothing runs or waits afterwards", took is not None)
        verdict.check("health afterwards", read(running.base, "/health")[0] == 200)
    verdict.end()


if __name__ == "__main__":
    main()
