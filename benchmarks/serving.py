"""Does a server hold under load: too many requests, killed replicas, clients that leave?

    python benchmarks/serving.py MODEL_DIR overload|kills|cancels [--full] [--write]

``overload`` measures what two replicas answer at most (as many clients as both batches hold and
half as many again), and then sends twice as many requests at fixed times, whatever happens to
them. ``kills`` ends one of two replicas with SIGKILL every so often, never the last one, under
clients that try again for 120 s and streams that do not. ``cancels`` leaves requests at every
moment of their lives. Short by default; ``--full`` runs 5 minutes and 10,000 cancellations.
"""

import argparse
import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from serving_bed import (
    BATCH,
    QUEUE,
    Client,
    Running,
    Tally,
    is_written,
    percentile,
    served,
    wait_for_zero,
)

from report import write_results

SEED = 11
TOKENS, STREAM_TOKENS = 32, 200
RETRY_FOR_S = 120.0
USER_PERIOD_S = 8.0
"""Seconds between the requests of a user of locust, as in serving_locust.py."""
SHORT = {"overload": 60.0, "kills": 100.0, "cancels": 1500}
FULL = {"overload": 300.0, "kills": 300.0, "cancels": 10_000}


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


async def until_answered(client: Client, number: int) -> str:
    """Send a request again until it is answered, for two minutes."""
    deadline = time.monotonic() + RETRY_FOR_S
    tries = 0
    while time.monotonic() < deadline:
        outcome = await client.whole(number, TOKENS)
        if outcome == "200":
            return "answered" if tries == 0 else "answered after retries"
        if outcome.startswith(("4", "200")) and outcome != "429":
            return outcome
        tries += 1
        await asyncio.sleep(min(1.0, 0.1 * 2**tries))
    return f"given up ({outcome})"


async def kills(running: Running, model: str, seconds: float, every: float) -> dict[str, object]:
    """Kill a replica now and then; two must be there before the next one dies."""
    client, tally = Client(running.base, model), Tally()
    ends = time.monotonic() + seconds
    number_of_kills, back = 0, []

    async def repeat(ask: Callable, kind: str, number: int) -> None:
        while time.monotonic() < ends:
            begun = time.monotonic()
            tally.add(f"{kind} {await ask(number)}", time.monotonic() - begun)

    async def kill() -> None:
        nonlocal number_of_kills
        chosen = random.Random(SEED)
        await asyncio.sleep(5)
        while time.monotonic() < ends - 5:
            alive = await asyncio.to_thread(running.replicas)
            victim = chosen.choice(sorted(alive))
            killed = time.time()
            os.kill(victim, signal.SIGKILL)
            number_of_kills += 1
            while not await asyncio.to_thread(_are_back, running, killed):
                await asyncio.sleep(0.2)
            back.append(time.time() - killed)
            await asyncio.sleep(max(0.0, every - back[-1]))

    whole = [repeat(lambda n: until_answered(client, n), "whole", i) for i in range(8)]
    streams = [repeat(lambda n: client.stream(n, STREAM_TOKENS), "stream", i) for i in range(4)]
    await asyncio.gather(kill(), *whole, *streams)
    await client.session.close()
    asked = sum(n for what, n in tally.counts.items() if what.startswith("whole"))
    good = tally.counts["whole answered"] + tally.counts["whole answered after retries"]
    silent = sum(n for what, n in tally.counts.items() if "silence" in what)
    print("\n".join(tally.lines()))
    print(
        f"{number_of_kills} kills; two replicas again after {', '.join(f'{s:.1f}' for s in back)} s"
    )
    print(
        f"answered {good} of {asked} = {100 * good / asked:.2f} %; streams cut in silence {silent}"
    )
    return {
        "kills": number_of_kills,
        "seconds_until_back": back,
        "answered_share": good / asked,
        "cut_in_silence": silent,
        "outcomes": dict(tally.counts),
    }


def _are_back(running: Running, killed: float) -> bool:
    """True when Ray has taken a new replica into service."""
    return is_written(running, "controller", "started successfully on node", killed) is not None


async def cancels(running: Running, model: str, count: int) -> dict[str, object]:
    """Leave requests before, at and after every moment of theirs."""
    client, chosen, tally = Client(running.base, model), random.Random(SEED), Tally()
    left = iter(range(count))

    async def leave(_: int) -> None:
        for number in left:
            begun = time.monotonic()
            if number % 2:
                outcome = await client.stream(number, STREAM_TOKENS, chosen.choice((1, 2, 10, 60)))
            else:
                task = asyncio.create_task(client.whole(number, STREAM_TOKENS))
                await asyncio.sleep(chosen.choice((0, 0.001, 0.01, 0.05, 0.2)))
                outcome = "ended before" if task.done() else "left"
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            tally.add(outcome, time.monotonic() - begun)

    await asyncio.gather(*map(leave, range(3 * BATCH)))
    not_zero = await asyncio.to_thread(wait_for_zero, running)
    places = 2 * (BATCH + QUEUE)  # of both replicas, so none may have been lost
    again = Tally()

    async def ask(number: int) -> None:
        again.add(await client.whole(number, 4), 0.0)

    await asyncio.gather(*map(ask, range(places // 2)))
    await client.session.close()
    print("\n".join(tally.lines()))
    print(f"gauges that are not at 0: {not_zero or 'none'}")
    print(f"{places // 2} requests at once afterwards: {dict(again.counts)}")
    return {"outcomes": dict(tally.counts), "not_zero": not_zero, "afterwards": dict(again.counts)}


def is_good(kind: str, found: dict) -> bool:
    """True where what must hold has held; latencies and rates are only reported."""
    if kind == "overload":
        return found["lost"] == 0 and found["outcomes"].get("429", 0) > 0
    if kind == "kills":
        return (
            found["kills"] > 0 and found["cut_in_silence"] == 0 and found["answered_share"] >= 0.999
        )
    return not found["not_zero"] and set(found["afterwards"]) == {"200"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, metavar="MODEL_DIR")
    parser.add_argument("kind", choices=sorted(SHORT))
    parser.add_argument("--full", action="store_true", help="5 minutes, 10,000 cancellations")
    parser.add_argument("--seconds", type=float, help="of overload or kills")
    parser.add_argument("--cancels", type=int, help="how many requests to leave")
    parser.add_argument("--every", type=float, default=60.0, help="seconds between kills")
    parser.add_argument("--locust", type=Path, metavar="FOLDER", help="send with locust from there")
    parser.add_argument("--write", action="store_true", help="keep the figures in results/")
    options = parser.parse_args()
    length = (FULL if options.full else SHORT)[options.kind]
    length = options.seconds or options.cancels or length
    with served(options.model, 2) as running:
        if options.locust is not None:
            with_locust(running, options.model.name, length, options.locust)
            return
        work = {
            "overload": lambda: overload(running, options.model.name, length),
            "kills": lambda: kills(running, options.model.name, length, options.every),
            "cancels": lambda: cancels(running, options.model.name, int(length)),
        }
        found = asyncio.run(work[options.kind]())
        left = wait_for_zero(running)
        print(f"after it, requests that run or wait: {left or 'none'}")
    if options.write:
        write_results(f"serving_{options.kind}", {"length": length, **found})
    sys.exit(0 if is_good(options.kind, found) and not left else 1)


if __name__ == "__main__":
    main()
