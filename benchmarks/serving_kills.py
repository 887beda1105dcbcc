"""Replicas that are killed under load: the part ``kills`` of benchmarks/serving.py."""

import asyncio
import os
import random
import signal
import time
from collections.abc import Callable

from serving_bed import Client, Running, Tally, is_written

SEED = 11
TOKENS, STREAM_TOKENS = 32, 200
RETRY_FOR_S = 120.0


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
            print(f"kill {number_of_kills}: two replicas after {back[-1]:.1f} s", flush=True)
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
