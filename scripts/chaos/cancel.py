"""Are places, batch and queue free again after clients have left at any moment?

    python scripts/chaos/cancel.py [BASE_URL --api-key KEY] [--seed 1] [--count 1000]

Clients leave while they send the body, when they have sent it, at the answer's headers, at its
first event, some events later, and while their request waits in the queue, 24 at a time, some by
closing and some by a reset. Then the gauges of running and waiting requests must come to 0 and
requests that fill the batch must be answered.
"""

import asyncio
import json
import random
import socket
import struct
import time
from collections import Counter
from urllib.parse import urlsplit

from served import Target, arguments, end, target_of

MOMENTS = ["in the body", "body sent", "headers", "first event", "third event", "in the queue"]
AT_ONCE = 24
SETTLE_S = 60
GAUGES = ("moeyard_requests_running", "moeyard_requests_waiting")
WAIT_S = 60
"""For what a moment needs; a client that does not get it leaves all the same."""


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--count", type=int, default=1000)
    given = parser.parse_args()
    print(f"seed {given.seed}")
    with target_of(given) as target:
        before = target.totals()
        started = time.monotonic()
        reached = asyncio.run(leave_all(target, random.Random(given.seed), given.count))
        print(f"left {given.count} in {time.monotonic() - started:.0f} s, by moment:")
        for moment, count in sorted(reached.items()):
            print(f"  {moment}: {count}")
        check_settled(target, before)
        for _ in range(4):
            target.check_alive()
    end(target)


async def leave_all(target: Target, numbers: random.Random, count: int) -> Counter:
    """Let clients come and leave."""
    reached: Counter = Counter()
    places = asyncio.Semaphore(AT_ONCE)

    async def leave(moment: str, is_reset: bool, num_answers: int) -> None:
        async with places:
            reached[await leave_at(target, moment, is_reset, num_answers)] += 1

    jobs = [
        leave(MOMENTS[i % len(MOMENTS)], numbers.random() < 0.5, numbers.randrange(1, 5))
        for i in range(count)
    ]
    await asyncio.gather(*jobs)
    return reached


async def leave_at(target: Target, moment: str, is_reset: bool, num_answers: int) -> str:
    """Send a streamed request, leave at a moment, and say what was reached."""
    address = urlsplit(target.base)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    body = json.dumps(
        {
            "model": target.model,
            "prompt": "some text to read",
            "max_tokens": 200,
            "n": num_answers,
            "stream": True,
        }
    ).encode()
    headers = {"Host": "a", "Content-Length": str(len(body)), **target.headers}
    lines = [f"{name}: {value}" for name, value in headers.items()]
    head = "\r\n".join(["POST /v1/completions HTTP/1.1", *lines, "", ""]).encode()
    try:
        writer.write(head + (body[: len(body) // 2] if moment == "in the body" else body))
        await writer.drain()
        if moment == "in the queue":
            await asyncio.sleep(0.02)  # 24 clients and up to 4 answers each wait for 8 places
        elif moment not in ("in the body", "body sent"):
            await asyncio.wait_for(read_until(reader, moment), WAIT_S)
    except TimeoutError:
        moment = f"{moment}: not in time"
    except (asyncio.IncompleteReadError, ConnectionError):
        moment = f"{moment}: closed"
    except RefusedError as refused:
        moment = f"{moment}: {refused}"
    finally:
        if is_reset:
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.close()
    return moment


class RefusedError(Exception):
    """The server said no, with a status."""


async def read_until(reader: asyncio.StreamReader, moment: str) -> None:
    """Read an answer up to its headers, its first event or its third."""
    status = (await reader.readuntil(b"\r\n")).split()[1].decode()
    if status != "200":
        raise RefusedError(status)
    await reader.readuntil(b"\r\n\r\n")
    for _ in range({"first event": 1, "third event": 3}.get(moment, 0)):
        await reader.readuntil(b"\n\n")


def check_settled(target: Target, before: dict[str, float]) -> None:
    """Wait until nothing runs and nothing waits."""
    started = time.monotonic()
    while True:
        totals = target.totals()
        if all(totals[name] == 0 for name in GAUGES):
            break
        if time.monotonic() - started > SETTLE_S:
            target.fault(f"after {SETTLE_S} s: { {name: totals[name] for name in GAUGES} }")
            break
        time.sleep(0.5)
    cancelled = "moeyard_requests_cancelled_total"
    print(
        f"gauges 0 after {time.monotonic() - started:.1f} s, "
        f"cancelled answers {totals[cancelled] - before[cancelled]:.0f}"
    )


if __name__ == "__main__":
    main()
