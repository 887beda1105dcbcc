"""Streams from a server, and the CPU time its processes spend on them: token_path.py's client.

It is a separate process, so that its work is not counted as the server's. It does little while the
streams run: it keeps what arrives, and parses it at the end.
"""

import argparse
import contextlib
import json
import selectors
import socket
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

WARM_CHUNKS = 20
"""Chunks of every stream before the measured window, and left of the first one after it."""
EVENT = b"data: "


COUNTS = ("cpu_ns", "waits", "preemptions", "faults")
"""What is counted for a thread: nanoseconds of CPU, switches that it asked for, others, and pages
that it was the first to touch."""
Counts = tuple[int, ...]


def of_thread(pid: int, thread: int) -> Counts:
    """Return :data:`COUNTS` of a thread; raises OSError when it has ended."""
    task = Path(f"/proc/{pid}/task/{thread}")
    nanoseconds = int((task / "schedstat").read_text().split()[0])
    status = dict(line.split(":", 1) for line in (task / "status").read_text().splitlines())
    switches = (int(status[f"{kind}_ctxt_switches"]) for kind in ("voluntary", "nonvoluntary"))
    faults = int((task / "stat").read_text().rpartition(")")[2].split()[7])
    return (nanoseconds, *switches, faults)


def counts_of(pids: list[int]) -> dict[tuple[int, int], Counts]:
    """Return :data:`COUNTS` of every thread of these processes."""
    found = {}
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").glob("*"):
            with contextlib.suppress(OSError):  # a thread or process that has ended
                found[pid, int(task.name)] = of_thread(pid, int(task.name))
    return found


def differences(
    before: dict[tuple[int, int], Counts], after: dict[tuple[int, int], Counts]
) -> dict[tuple[int, int], Counts]:
    """Return what each thread of ``after`` has added."""
    nothing = (0,) * len(COUNTS)
    return {
        key: tuple(a - b for a, b in zip(counts, before.get(key, nothing), strict=True))
        for key, counts in after.items()
    }


class Stream:
    """One connection with one streamed answer."""

    def __init__(self, port: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.sendall(head.encode() + data)
        self.parts: list[bytes] = []
        self.num_reads = 0
        self.num_chunks = 0

    def read(self) -> bool:
        """Take what is there; return whether the answer is whole."""
        data = self.socket.recv(1 << 16)
        assert data, b"".join(self.parts)[-500:]
        self.parts.append(data)
        self.num_reads += 1
        self.num_chunks += data.count(EVENT)
        return data.endswith(b"0\r\n\r\n")

    def events(self) -> list[dict[str, Any]]:
        """Return the answer's events, and check that the last one says [DONE]."""
        head, _, rest = b"".join(self.parts).partition(b"\r\n\r\n")
        assert b" 200 " in head.splitlines()[0], head
        body = b""
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            length = int(size, 16)
            body, rest = body + rest[:length], rest[length + 2 :]
        *events, done = [e.removeprefix(EVENT) for e in body.split(b"\n\n") if e]
        assert done == b"[DONE]", body[-200:]
        return [json.loads(event) for event in events]


def measure(port: int, body: dict[str, Any], num_streams: int, pids: list[int]) -> dict[str, Any]:
    """Run the streams at once; return the window's seconds, chunks and counts of threads.

    The prompt has a place for the stream's number.
    """
    started = time.monotonic()
    prompts = (body["prompt"].format(index) for index in range(num_streams))
    streams = [Stream(port, body | {"prompt": prompt}) for prompt in prompts]
    selector = selectors.DefaultSelector()
    for stream in streams:
        selector.register(stream.socket, selectors.EVENT_READ, stream)
    last = body["max_tokens"] - WARM_CHUNKS
    before = after = None
    left = num_streams
    while left:
        for key, _ in selector.select():
            if key.data.read():
                selector.unregister(key.data.socket)
                left -= 1
        counts = [stream.num_chunks for stream in streams]
        if before is None and min(counts) >= WARM_CHUNKS:
            before = time.monotonic(), sum(counts), counts_of(pids), _reads(streams)
        elif before is not None and after is None and max(counts) >= last:
            after = time.monotonic(), sum(counts), counts_of(pids), _reads(streams)
    assert before is not None and after is not None, "the window is empty; ask for more tokens"
    by_pid: dict[int, list[Counts]] = defaultdict(list)
    for (pid, _), counts in differences(before[2], after[2]).items():
        by_pid[pid].append(counts)
    return {
        "seconds": after[0] - before[0],
        "chunks": after[1] - before[1],
        "reads": after[3] - before[3],
        "whole_s": time.monotonic() - started,
        "counts": by_pid,
        "events": [len(stream.events()) for stream in streams],
    }


def _reads(streams: list[Stream]) -> int:
    return sum(stream.num_reads for stream in streams)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("body")
    parser.add_argument("streams", type=int)
    parser.add_argument("pids", type=int, nargs="*")
    args = parser.parse_args()
    print(json.dumps(measure(args.port, json.loads(args.body), args.streams, args.pids)))
