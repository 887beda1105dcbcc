"""Does a server that works for long grow?

    python scripts/chaos/server_soak.py [SECONDS]

Eight clients send whole answers, streams, streams that are left in the middle, chats without a
template and bad requests, in a random order. Memory, files and threads of every process are looked
at every five seconds; the slope of memory over the second half must stay under a bound, and files
and threads must not grow with it.
"""

import http.client
import json
import random
import sys
import threading
import time
from collections import Counter, defaultdict
from pathlib import Path

from verdict import Verdict
from with_server import memory_mb, num_files, processes, served, wait_for

SEED = 11
CLIENTS = 8
EVERY_S = 5.0
MAX_SLOPE_MB_PER_MIN = 1.5
WATCHED = ("ray::ServeReplica", "ray::ProxyActor", "ray::HubActor", "ray::ServeController")


class Client(threading.Thread):
    """Asks until it is told to stop."""

    def __init__(self, port: int, seed: int) -> None:
        super().__init__()
        self._port, self._random = port, random.Random(seed)
        self.is_stopping = False
        self.outcomes: Counter[str] = Counter()

    def run(self) -> None:
        kinds = ["whole", "stream", "left", "bad", "health"]
        while not self.is_stopping:
            (kind,) = self._random.choices(kinds, weights=[6, 4, 1, 2, 1])
            try:
                self.outcomes[f"{kind} {self._ask(kind)}"] += 1
            except (OSError, http.client.HTTPException) as error:
                self.outcomes[f"{kind} lost: {error!r}"] += 1

    def _ask(self, kind: str) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        try:
            if kind == "health":
                connection.request("GET", "/health")
                return self._read(connection)
            values = {"model": "long", "prompt": f"hello {self._random.randrange(1000)}"}
            values["max_tokens"] = 2000 if kind == "left" else self._random.randrange(1, 40)
            values["stream"] = kind in ("stream", "left")
            if kind == "bad":
                values["temperature"] = -1
            connection.request("POST", "/v1/completions", json.dumps(values))
            if kind == "left":
                answer = connection.getresponse()
                answer.read(200)
                return answer.status
            return self._read(connection)
        finally:
            connection.close()

    def _read(self, connection: http.client.HTTPConnection) -> int:
        answer = connection.getresponse()
        answer.read()
        return answer.status


def slope(points: list[tuple[float, float]]) -> float:
    """Return the least-squares slope of y over x."""
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    above = sum((x - mean_x) * (y - mean_y) for x, y in points)
    return above / sum((x - mean_x) ** 2 for x, _ in points)


def num_threads(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/task").iterdir()))


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 300.0
    verdict = Verdict()
    verdict.say(f"seed {SEED}: {CLIENTS} clients, {seconds:.0f} s")
    with served() as running:
        pids = {name: processes(running)[name][0] for name in WATCHED}
        clients = [Client(running.port, SEED + number) for number in range(CLIENTS)]
        for client in clients:
            client.start()
        started = time.monotonic()
        memory = defaultdict(list)
        counts = defaultdict(list)
        while (now := time.monotonic() - started) < seconds:
            for name, pid in pids.items():
                memory[name].append((now / 60, memory_mb(pid)))
                counts[name].append((num_files(pid), num_threads(pid)))
            time.sleep(EVERY_S)
        for client in clients:
            client.is_stopping = True
        for client in clients:
            client.join()
        outcomes = sum((client.outcomes for client in clients), Counter())
        for outcome, count in sorted(outcomes.items()):
            verdict.say(f"     {outcome:<40}{count:>8}")
        good = {"whole 200", "stream 200", "left 200", "bad 400", "health 200"}
        verdict.check("every request was answered as it should", set(outcomes) <= good)
        for name in WATCHED:
            half = memory[name][len(memory[name]) // 2 :]
            growth = slope(half)
            told = f"{memory[name][0][1]:.0f} -> {half[-1][1]:.0f} MB, {growth:+.2f} MB/min"
            verdict.check(f"{name}: memory", growth < MAX_SLOPE_MB_PER_MIN, told)
            settled = [files for files, _ in counts[name][1:4]]
            last = [files for files, _ in counts[name][-3:]]
            told = f"{counts[name][1][0]} -> {counts[name][-1][0]} files"
            told += f", {counts[name][1][1]} -> {counts[name][-1][1]} threads"
            is_steady = min(last) <= max(settled) + CLIENTS
            verdict.check(f"{name}: files and threads", is_steady, told)

        def is_idle() -> bool:
            return running.totals()["moeyard_requests_running"] == 0

        verdict.check("nothing runs afterwards", wait_for(is_idle, 30) is not None)
    verdict.end()


if __name__ == "__main__":
    main()
