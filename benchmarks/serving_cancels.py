"""Clients that leave at any moment: the part ``cancels`` of benchmarks/serving.py."""

import asyncio
import random
import time

from serving_bed import BATCH, QUEUE, Client, Running, Tally, wait_for_zero

SEED = 11
STREAM_TOKENS = 200
PROGRESS_EVERY = 1000


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
            if tally.counts.total() % PROGRESS_EVERY == 0:
                print(f"{tally.counts.total()} of {count} cancellations", flush=True)

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
