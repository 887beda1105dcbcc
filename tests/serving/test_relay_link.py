"""The connection of a replica to a proxy: order, completeness, and whom it wakes."""

import asyncio
import contextlib
import json
import os
import random
import socket
import threading

import pytest

from moeyard.serving.engine.reader import hand_over
from moeyard.serving.proxy_guard import ProxyGuard
from moeyard.serving.relay import sender
from moeyard.serving.relay.frames import HEADER, FrameReader, frame, unix_socket
from moeyard.serving.relay.link import Link
from moeyard.serving.serve_args import ServeArgs
from moeyard.serving.server import Server

from http_calls import client_of

BODY = {"model": "small", "prompt": "ab", "max_tokens": 60, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(model_folder):
    running = Server(ServeArgs(model=str(model_folder)))
    yield running
    running.close()


def pair():
    """Return two connected sockets, the first of which takes little at once and never waits."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    ours.setblocking(False)
    return ours, theirs


def test_frames_of_two_threads_arrive_whole_and_in_order_though_the_proxy_reads_late():
    ours, theirs = pair()
    pieces = {n: [random.Random(n).randbytes(100 + i % 90) for i in range(400)] for n in (1, 2)}

    def engine(link):
        for piece in pieces[1]:
            assert link.add(frame(1, piece))
            link.flush()  # returns at once: no one reads yet

    async def send():
        link = Link(ours)
        thread = threading.Thread(target=engine, args=(link,))
        thread.start()
        for piece in pieces[2]:
            link.write(frame(2, piece))
            await asyncio.sleep(0)
        thread.join()
        reader, came = FrameReader(), {1: [], 2: []}
        theirs.setblocking(False)
        while any(len(came[n]) < 400 for n in came):
            with contextlib.suppress(BlockingIOError):
                for number, piece in reader.feed(theirs.recv(3000)):
                    came[number].append(piece)
            await asyncio.sleep(0)
        link.close()
        return came

    with theirs:
        assert asyncio.run(asyncio.wait_for(send(), 30)) == pieces


def test_a_link_whose_proxy_is_gone_takes_nothing_and_holds_nothing():
    ours, theirs = pair()

    async def send():
        link = Link(ours)
        assert link.add(b"a")
        theirs.close()
        link.flush()
        while link.is_open:
            await asyncio.sleep(0)
        assert not link.add(b"b") and link._frames == []
        await asyncio.sleep(0.01)
        assert ours.fileno() < 0, "the socket is still open"
        link.flush()

    asyncio.run(asyncio.wait_for(send(), 30))


async def woken_while(loop, answer):
    """Return an answer, and how often the engine's thread has woken the event loop for it."""
    calls, tell = [], loop.call_soon_threadsafe

    def counted(callback, *args, **options):
        calls.append(callback is hand_over)
        return tell(callback, *args, **options)

    loop.call_soon_threadsafe = counted
    found = await answer
    assert found.status_code == 200
    return found, sum(calls)


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_the_event_loop_wakes_for_the_end_of_an_answer_alone(server, stream):
    async def ask():
        async with client_of(ProxyGuard(server.app())) as client:
            answer = client.post("/v1/completions", json={**BODY, "stream": stream})
            return await woken_while(asyncio.get_running_loop(), answer)

    answer, count = asyncio.run(ask())
    assert count == 1
    assert answer.text.count("data: ") > 30 if stream else answer.json()["choices"][0]["text"]


def test_a_stream_whose_proxy_ends_is_cancelled_in_the_engine(server):
    """No client disconnects: the proxy is gone, and only the next token shows it."""
    name = f"moeyard-{os.urandom(16).hex()}"
    door = unix_socket()
    door.bind("\0" + name)
    door.listen()
    body = json.dumps({**BODY, "stream": True, "max_tokens": 250}).encode()
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "headers": [(HEADER, f"{name}.{7:016x}".encode())],
        "query_string": b"",
    }
    parts = [{"type": "http.request", "body": body, "more_body": False}]
    step, may_step = server.thread.engine.step, threading.Semaphore(3)
    server.thread.engine.step = lambda: may_step.acquire(timeout=20) and step()

    async def receive():
        while not parts:
            await asyncio.Event().wait()
        return parts.pop()

    async def send(message):
        if message["type"] == "http.response.start":
            assert (HEADER, b"1") in message["headers"]

    async def ask():
        asked = asyncio.create_task(server.app()(scope, receive, send))
        end, loop = None, asyncio.get_running_loop()
        end, _ = await loop.sock_accept(door)
        assert await loop.sock_recv(end, 1)
        end.close()
        may_step.release(300)
        await asked
        while server.thread.engine.has_work:
            await asyncio.sleep(0.001)

    before = server.metrics.cancelled._value.get()
    try:
        with door:
            asyncio.run(asyncio.wait_for(ask(), 30))
    finally:
        server.thread.engine.step = step
    assert server.metrics.cancelled._value.get() == before + 1
    assert name.encode() not in {n for n, link in sender._links.items() if link.is_open}
