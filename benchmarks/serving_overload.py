"""More requests than a server can answer: the part ``overload`` of benchmarks/serving.py."""

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path

from serving_bed import BATCH, Client, Running, Tally, percentile

TOKENS = 32
USER_PERIOD_S = 8.0
"""Seconds between the requests of a user of locust, as in serving_locust.py."""


def memory_mb(running: Running) -> dict[str, float]:
    """Return the resident memory of replicas and proxy."""
    pages = {}
    for number, pid in enumerate(sorted(running.replicas())):
        pages[f"replica {number}"] = _resident(pid)
    for pid in map(int, running.members()):
        if "ProxyActor" in Path(f"/proc/{pid}/cmdline").read_text(errors="replace"):
            pages["proxy"] = _resident(pid)
    return pages


def cpu_seconds(running: Running) -> dict[str, float]:
    """Return the processor time that replicas and proxy have taken so far."""
    found: dict[str, float] = {}
    for pid in map(int, running.members()):
        title = Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
        name = next(
            (n for n in ("ServeReplica", "ProxyActor") if title.startswith(f"ray::{n}")), ""
        )
        if name:
            words = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
            ticks = int(words[11]) + int(words[12])
            found[name] = found.get(name, 0.0) + ticks / os.sysconf("SC_CLK_TCK")
    return found


def _resident(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


async def closed_loop(client: Client, clients: int, seconds: float) -> float:
    """Return the answers per second of so many clients that ask again at once."""
    ends = time.monotonic() + seconds
    count = 0

    async def ask(number: int) -> None:
        nonlocal count
        while time.monotonic() < ends:
            outcome = await client.whole(number, TOKENS)
            count += outcome == "200"

    started = time.monotonic()
    await asyncio.gather(*map(ask, range(clients)))
    return count / (time.monotonic() - started)


async def open_loop(client: Client, rate: float, seconds: float, tally: Tally) -> float:
    """Send ``rate`` requests a second; return how long after the last one all had ended."""
    started = time.monotonic()
    running: set[asyncio.Task[None]] = set()

    async def ask(number: int) -> None:
        begun = time.monotonic()
        outcome = await client.whole(number, TOKENS)
        tally.add(outcome, time.monotonic() - begun)

    for number in range(int(rate * seconds)):
        wait_s = started + number / rate - time.monotonic()
        if wait_s > 0:
            await asyncio.sleep(wait_s)
        task = asyncio.create_task(ask(number))
        running.add(task)
        task.add_done_callback(running.discard)
    last = time.monotonic()
    await asyncio.gather(*running)
    return time.monotonic() - last


async def overload(running: Running, model: str, seconds: float) -> dict[str, object]:
    """Offer twice of what the server can answer."""
    client = Client(running.base, model)
    await closed_loop(client, 3 * BATCH, 5.0)
    capacity = await closed_loop(client, 3 * BATCH, min(30.0, seconds / 3))
    tally, memory = Tally(), []
    stop = asyncio.Event()

    async def watch() -> None:
        while not stop.is_set():
            memory.append(await asyncio.to_thread(memory_mb, running))
            await asyncio.sleep(2)

    watching = asyncio.create_task(watch())
    before = cpu_seconds(running)
    tail_s = await open_loop(client, 2 * capacity, seconds, tally)
    after = cpu_seconds(running)
    stop.set()
    await watching
    await client.session.close()
    answered = tally.counts["200"] / (seconds + tail_s)
    refused = tally.seconds.get("429", [])
    drift = {
        name: 100 * (memory[-1][name] / memory[len(memory) // 5][name] - 1) for name in memory[-1]
    }
    used = {name: after[name] - before[name] for name in after}
    cpu = ", ".join(f"{name} {s / (seconds + tail_s):.2f}" for name, s in used.items())
    lost = sum(n for what, n in tally.counts.items() if what not in ("200", "429"))
    print("\n".join(tally.lines()))
    print(f"cores used: {cpu}")
    print(f"capacity {capacity:.1f} answers/s, offered {2 * capacity:.1f}, answered {answered:.1f}")
    print(f"answered / capacity {answered / capacity:.2f}; all ended {tail_s:.1f} s after the last")
    print(
        "memory in the last four fifths, %: " + ", ".join(f"{n} {d:+.1f}" for n, d in drift.items())
    )
    return {
        "capacity": capacity,
        "answered_per_s": answered,
        "answered_over_capacity": answered / capacity,
        "refused_p50_ms": 1000 * percentile(refused, 0.5),
        "refused_p99_ms": 1000 * percentile(refused, 0.99),
        "outcomes": dict(tally.counts),
        "lost": lost,
        "cpu_seconds": used,
        "memory_drift_percent": drift,
    }


def with_locust(running: Running, model: str, seconds: float, folder: Path) -> None:
    """Offer twice of what the server can answer by a program of others."""

    async def find_capacity() -> float:
        client = Client(running.base, model)
        await closed_loop(client, 3 * BATCH, 5.0)
        found = await closed_loop(client, 3 * BATCH, 15.0)
        await client.session.close()
        return found

    capacity = asyncio.run(find_capacity())
    users = int(2 * capacity * USER_PERIOD_S)
    file = Path(__file__).parent / "serving_locust.py"
    command = [sys.executable, "-m", "locust", "-f", str(file), "--headless", "--only-summary"]
    command += ["-u", str(users), "-r", str(users / USER_PERIOD_S)]
    command += ["-t", f"{seconds + USER_PERIOD_S:.0f}s", "--host", running.base]
    env = {**os.environ, "PYTHONPATH": str(folder), "MODEL": model}
    print(f"capacity {capacity:.1f} answers/s; locust with {users} users", flush=True)
    subprocess.run(command, env=env, check=False)
