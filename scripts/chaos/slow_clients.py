"""Do clients that are slow on purpose keep others out, or memory and files taken?

    python scripts/chaos/slow_clients.py

Heads and bodies that never become whole (200 of each, more than Ray has places), streams that
no one reads, large bodies, and thousands of connections on which nothing comes. Meanwhile every
health check and every completion of an honest client must be answered within ten seconds, and in
the end the server must have closed all of them.
"""

import json
import resource
import select
import socket
import time
from collections import Counter
from collections.abc import Callable

from verdict import Verdict
from with_server import ask, connect, memory_mb, num_files, processes, read, served

SLOW = 200
IDLE = 3000
READERS = 8
"""The whole batch."""
LARGE_BODIES = 20
PATIENCE_S = 45.0
"""The server's own is 30 s."""
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n"


def state_of(client: socket.socket) -> str:
    """Return what the server has done with a connection: a status, closed, or open."""
    client.setblocking(False)
    try:
        content = client.recv(65536)
    except BlockingIOError:
        return "open"
    except OSError:
        return "reset"
    return content[9:12].decode() if content.startswith(b"HTTP/") else "closed"


def honest(base: str, seconds: float) -> tuple[int, float, str]:
    """Ask for so long; return how many answers came, the slowest, and what went wrong."""
    count, slowest, ends = 0, 0.0, time.monotonic() + seconds
    while time.monotonic() < ends:
        for call in (lambda: read(base, "/health")[0] == 200, lambda: bool(ask(base, 10)["usage"])):
            started = time.monotonic()
            try:
                if not call():
                    return count, slowest, "not 200"
            except OSError as error:
                return count, slowest, repr(error)
            slowest = max(slowest, time.monotonic() - started)
            count += 1
        time.sleep(0.2)
    return count, slowest, ""


def trial(verdict: Verdict, running, name: str, make: Callable[[], list[socket.socket]]) -> None:
    """Let slow clients come, ask honestly meanwhile, and see the slow ones off."""
    clients = make()
    count, slowest, problem = honest(running.base, 5)
    verdict.check(
        f"{name}: honest clients answered",
        not problem,
        f"{count}, slowest {slowest:.2f} s {problem}",
    )
    deadline = time.monotonic() + PATIENCE_S
    states: Counter[str] = Counter()
    left = clients
    while left and time.monotonic() < deadline:
        found = [(client, state_of(client)) for client in left]
        states.update(state for _, state in found if state != "open")
        left = [client for client, state in found if state == "open"]
        time.sleep(0.2)
    verdict.check(
        f"{name}: all {len(clients)} seen off", not left, f"{dict(states)}, open {len(left)}"
    )
    for client in clients:
        client.close()


def sent(running, content: bytes, number: int) -> list[socket.socket]:
    clients = []
    for _ in range(number):
        clients.append(connect(running.port))
        clients[-1].sendall(content)
    return clients


def readers(running) -> list[socket.socket]:
    """Return streams of several MB whose clients will not read."""
    body = {"model": "long", "prompt": "hello 1", "max_tokens": 8000, "temperature": 0}
    content = json.dumps({**body, "stream": True, "logprobs": 5}).encode()
    found = []
    for _ in range(READERS):
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", running.port))
        client.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(content) + content)
        found.append(client)
    return found


def not_read(verdict: Verdict, running) -> None:
    """See that streams that no one reads end, and give their places back."""
    clients = readers(running)
    time.sleep(2)
    deadline = time.monotonic() + 240
    ended = -1.0
    started = time.monotonic()
    while time.monotonic() < deadline:
        totals = running.totals()
        if totals["moeyard_requests_running"] == 0 == totals["moeyard_requests_waiting"]:
            ended = time.monotonic() - started
            break
        time.sleep(1)
    verdict.check(
        f"{READERS} streams that no one reads: places free again", ended >= 0, f"{ended:.0f} s"
    )
    verdict.check("then a completion is answered", bool(ask(running.base)["usage"]))
    time.sleep(PATIENCE_S)
    # A connection that the server has given up is at its end once the kernel's bytes are read.
    ends = 0
    for client in clients:
        client.settimeout(10)
        try:
            while client.recv(1 << 20):
                pass
            ends += 1
        except ConnectionError:
            ends += 1
        except TimeoutError:
            pass
        client.close()
    verdict.check("their connections are closed", ends == READERS, f"{ends} of {READERS}")


def large(verdict: Verdict, running) -> None:
    """Send several bodies of 32 MiB, which are too large."""
    clients = [connect(running.port) for _ in range(LARGE_BODIES)]
    for client in clients:
        client.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % (32 << 20))
    block = b"a" * (1 << 20)
    states: Counter[str] = Counter()
    for client in clients:
        try:
            for _ in range(32):
                client.sendall(block)
        except OSError:
            pass
    for client in clients:
        select.select([client], [], [], 10)
        states[state_of(client)] += 1
        client.close()
    verdict.check(f"{LARGE_BODIES} bodies of 32 MiB refused", set(states) == {"413"}, dict(states))


def main() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    verdict = Verdict()
    with served() as running:
        (proxy,) = processes(running)["ray::ProxyActor"]
        (replica,) = processes(running)["ray::ServeReplica"]
        half = HEAD + b"Content-Length: 100000\r\n\r\n{"
        # Once before memory is looked at: what an allocator keeps for the next time is no growth.
        large(verdict, running)
        trial(verdict, running, "bodies", lambda: sent(running, half, SLOW))
        before = memory_mb(proxy), num_files(proxy), memory_mb(replica), num_files(replica)
        trial(verdict, running, "heads", lambda: sent(running, HEAD, SLOW))
        trial(verdict, running, "silent connections", lambda: sent(running, b"", IDLE))
        large(verdict, running)
        not_read(verdict, running)
        time.sleep(3)
        after = memory_mb(proxy), num_files(proxy), memory_mb(replica), num_files(replica)
        for name, old, new in zip(
            ("proxy MB", "proxy files", "replica MB", "replica files"), before, after, strict=True
        ):
            bound = old + (60 if "MB" in name else 5)
            verdict.check(f"{name} afterwards", new <= bound, f"{old:.0f} -> {new:.0f}")
    verdict.end()


if __name__ == "__main__":
    main()
