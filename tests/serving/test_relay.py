"""Streams that take the short way from a replica to the proxy are the same streams."""

import asyncio
import json
import random
import threading
import time

import httpx
import pytest

from moeyard.serving.proxy import watched
from moeyard.serving.proxy_guard import ProxyGuard
from moeyard.serving.relay import receiver, sender
from moeyard.serving.relay.frames import CUT, HEADER, WHOLE, FrameReader, end_frame, frame
from moeyard.serving.relay.link import Link
from moeyard.serving.serve_args import ServeArgs
from moeyard.serving.server import Server

from http_calls import client_of, events

SCOPE = {
    "type": "http",
    "method": "POST",
    "path": "/v1/completions",
    "headers": [],
    "query_string": b"",
}
BODY = {"model": "small", "prompt": "ab", "max_tokens": 24, "temperature": 0, "stream": True}
CHAT = {
    "model": "small",
    "messages": [{"role": "user", "content": "a"}],
    "max_tokens": 9,
    "temperature": 0,
}
STREAM = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"text/event-stream; charset=utf-8")],
}


@pytest.fixture(scope="module")
def server(model_folder, tmp_path_factory):
    template = tmp_path_factory.mktemp("template") / "chat.jinja"
    template.write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    running = Server(ServeArgs(model=str(model_folder), chat_template=str(template)))
    yield running
    running.close()


class Counted:
    """An application and the pieces of bodies that it sends by ``send``."""

    def __init__(self, app):
        self._app, self.pieces = app, []

    async def __call__(self, scope, receive, send):
        async def counted(message):
            if message["type"] == "http.response.body":
                self.pieces.append(message["body"])
            await send(message)

        await self._app(scope, receive, counted)


async def post(app, *bodies, path="/v1/completions"):
    """Return the answers to requests that are sent at once."""
    async with client_of(app) as client:
        return await asyncio.gather(*(client.post(path, json=body) for body in bodies))


def alike(response) -> list:
    """Return a stream's events without what differs between requests."""
    assert response.status_code == 200, response.text
    *found, done = events(response)
    assert done == "[DONE]"
    return [{**json.loads(event), "id": "", "created": 0} for event in found]


def test_frames_come_out_as_they_went_in_however_they_are_cut():
    rng = random.Random(7)
    sent, data = [], b""
    for _ in range(200):
        number = rng.getrandbits(64)
        piece = rng.choice([rng.randbytes(rng.randint(1, 90)), WHOLE, CUT])
        sent.append((number, piece))
        data += frame(number, piece) if isinstance(piece, bytes) else end_frame(number, piece)
    for longest in (1, 5, 30, 1000):
        reader, came, rest = FrameReader(), [], data
        while rest:
            size = rng.randint(1, longest)
            came += reader.feed(rest[:size])
            rest = rest[size:]
        assert came == sent


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", BODY),
        ("/v1/completions", {**BODY, "n": 3, "temperature": 1, "seed": 5}),
        ("/v1/completions", {**BODY, "logprobs": 2, "echo": True}),
        (
            "/v1/completions",
            {**BODY, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
        ),
        ("/v1/chat/completions", {**CHAT, "stream": True, "n": 2}),
        ("/v1/chat/completions", {**CHAT, "stream": True, "logprobs": True, "top_logprobs": 3}),
    ],
    ids=["plain", "choices", "logprobs", "usage", "chat", "chat_logprobs"],
)
def test_a_relayed_stream_has_the_events_of_a_plain_one(server, path, body):
    app = Counted(server.app())
    (relayed,) = asyncio.run(post(ProxyGuard(app), body, path=path))
    assert app.pieces == [b""], "pieces came by the long way"
    assert HEADER.decode() not in relayed.headers
    (plain,) = asyncio.run(post(server.app(), body, path=path))
    key = lambda chunk: [c["index"] for c in chunk["choices"]]  # noqa: E731
    # Choices may take turns in another way; each is in order.
    assert sorted(alike(relayed), key=key) == sorted(alike(plain), key=key)


def test_the_short_way_works_on_the_event_loop_that_ray_uses(server):
    uvloop = pytest.importorskip("uvloop")
    app = Counted(server.app())
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        (relayed,) = runner.run(post(ProxyGuard(app), BODY))
    assert app.pieces == [b""] and len(alike(relayed)) > 1


def test_streams_that_share_a_socket_stay_apart_and_leave_together(server, monkeypatch):
    bodies = [{**BODY, "prompt": "a" * (i + 1), "max_tokens": 30} for i in range(8)]
    plain = [alike(response) for response in asyncio.run(post(server.app(), *bodies))]
    writes = []
    flush = Link.flush

    def counted(link):
        if link._frames:
            writes.append(len(link._frames))
        flush(link)

    steps, step = [], server.thread.engine.step
    monkeypatch.setattr(Link, "flush", counted)
    monkeypatch.setattr(server.thread.engine, "step", lambda: steps.append(1) or step())
    relayed = asyncio.run(post(ProxyGuard(server.app()), *bodies))
    texts = [["".join(c["choices"][0]["text"] for c in s)] for s in map(alike, relayed)]
    assert texts == [["".join(c["choices"][0]["text"] for c in s)] for s in plain]
    # A write per step for all streams, and one more for each end.
    assert len(writes) <= len(steps) + 2 * len(bodies)
    assert max(writes) >= len(bodies)


class Begun:
    """An application that begins a stream by the short way and goes on as told."""

    def __init__(self, go_on):
        self._go_on = go_on

    async def __call__(self, scope, receive, send):
        relayed = sender.relayed(scope)
        headers = [*STREAM["headers"], (HEADER, b"1")]
        await send({**STREAM, "headers": headers})
        relayed.write(b"data: 1\n\n")
        await asyncio.sleep(0)
        await self._go_on(relayed, send)


async def finish(relayed, send):
    relayed.end(is_whole=True)
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def give_up(relayed, send):
    relayed.end(is_whole=False)


async def lose_connection(relayed, send):
    await asyncio.sleep(0)
    relayed._link.close()


async def close_without_a_word(relayed, send):
    await asyncio.sleep(0.01)
    relayed._link.close()
    await send({"type": "http.response.body", "body": b"", "more_body": False})


@pytest.mark.parametrize("go_on", [give_up, lose_connection, close_without_a_word])
def test_a_cut_stream_shows_what_came_then_an_error_event_and_done(go_on):
    (response,) = asyncio.run(post(ProxyGuard(Begun(go_on)), BODY))
    first, error, done = events(response)
    assert first == "1" and done == "[DONE]"
    assert "lost the process" in json.loads(error)["error"]["message"]


def test_the_end_waits_for_pieces_that_are_late():
    async def late(relayed, send):
        async def write():
            await asyncio.sleep(0.05)
            relayed.write(b"data: [DONE]\n\n")
            relayed.end(is_whole=True)

        task = asyncio.create_task(write())
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        await task

    (response,) = asyncio.run(post(ProxyGuard(Begun(late)), BODY))
    assert events(response) == ["1", "[DONE]"]


def test_an_end_that_never_comes_is_waited_for_only_so_long(monkeypatch):
    monkeypatch.setattr(watched, "RELAY_LAG_S", 0.05)

    async def forget(relayed, send):
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    (response,) = asyncio.run(post(ProxyGuard(Begun(forget)), BODY))
    first, error, done = events(response)
    assert (first, done) == ("1", "[DONE]") and "lost" in error


@pytest.mark.parametrize(
    "offered",
    [b"moeyard-" + b"0" * 32 + b"." + b"0" * 16, b"/run/any.sock", b"moeyard-" + b"0" * 32],
    ids=["not_there", "a_path", "no_stream"],
)
def test_without_a_socket_of_ours_the_stream_goes_the_long_way(server, offered):
    app = Counted(server.app())

    async def ask():
        async with client_of(app) as client:
            return await client.post("/v1/completions", json=BODY, headers={HEADER: offered})

    assert len(alike(asyncio.run(ask()))) > 1 and len(app.pieces) > 2


def test_no_stream_goes_to_a_process_of_another_user(server, monkeypatch):
    monkeypatch.setattr(sender, "is_same_user", lambda end: False)
    app = Counted(server.app())
    (response,) = asyncio.run(post(ProxyGuard(app), BODY))
    assert len(alike(response)) > 1 and len(app.pieces) > 2, "nothing came by the long way"


def test_nothing_is_taken_from_a_process_of_another_user(monkeypatch):
    monkeypatch.setattr(receiver, "is_same_user", lambda end: False)
    monkeypatch.setattr(watched, "RELAY_LAG_S", 0.05)
    (response,) = asyncio.run(post(ProxyGuard(Begun(finish)), BODY))
    error, done = events(response)
    assert "lost the process" in error and done == "[DONE]"


def test_clients_cannot_offer_a_socket(server):
    seen = []

    async def app(scope, receive, send):
        seen.extend(value for name, value in scope["headers"] if name == HEADER)
        await server.app()(scope, receive, send)

    async def ask():
        async with client_of(ProxyGuard(app)) as client:
            return await client.post("/v1/completions", json=BODY, headers={HEADER: "mine"})

    alike(asyncio.run(ask()))
    assert len(seen) == 1 and seen != [b"mine"]


def test_a_client_that_leaves_ends_its_stream_on_both_sides(server, monkeypatch):
    guard = ProxyGuard(server.app())
    steps, step = [], server.thread.engine.step

    def paced():
        """Stand still after some steps until the cancellation is there."""
        steps.append(1)
        deadline = time.monotonic() + 20
        while len(steps) > 20 and server.thread._commands.empty() and time.monotonic() < deadline:
            time.sleep(0.001)
        return step()

    monkeypatch.setattr(server.thread.engine, "step", paced)

    async def leave():
        came, gone = asyncio.Event(), asyncio.Event()

        async def receive():
            if not came.is_set():
                came.set()
                body = json.dumps({**BODY, "max_tokens": 250, "ignore_eos": True}).encode()
                return {"type": "http.request", "body": body, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            if message.get("body"):
                gone.set()

        await guard(SCOPE, receive, send)
        while server.thread.engine.has_work:
            await asyncio.sleep(0.001)

    before = cancelled(server)
    asyncio.run(asyncio.wait_for(leave(), 30))
    assert guard._relay._streams == {}
    assert cancelled(server) == before + 1


def cancelled(server) -> float:
    return server.metrics.cancelled._value.get()


def test_a_slow_client_holds_up_no_other(server):
    """One client takes nothing; the others' streams come whole, and then so does its own."""
    guard = ProxyGuard(server.app())

    async def ask():
        reads = asyncio.Event()
        sent = []

        async def slow(message):
            await reads.wait()
            sent.append(message)

        body = json.dumps(BODY).encode()
        parts = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive():
            while not parts:
                await asyncio.Event().wait()
            return parts.pop()

        held = asyncio.create_task(guard(SCOPE, receive, slow))
        others = await post(guard, BODY, BODY)
        assert not sent
        reads.set()
        await held
        content = b"".join(m.get("body", b"") for m in sent)
        return [*others, httpx.Response(200, content=content)]

    first, *others = map(alike, asyncio.run(asyncio.wait_for(ask(), 30)))
    joined = ["".join(c["choices"][0]["text"] for c in s) for s in (first, *others)]
    assert joined[0] and len(set(joined)) == 1


def test_a_prompt_that_is_tokenised_holds_up_no_stream(server, monkeypatch):
    """The tokenizer waits until another stream has sent ten more events."""
    encode, entered, may_end = server._tokenizer.encode, threading.Event(), threading.Event()
    came_meanwhile = []

    def slow(text):
        if len(text) > 20:
            entered.set()
            assert may_end.wait(20), "the stream stood still while a prompt was tokenised"
        return encode(text)

    steps, step = [], server.thread.engine.step

    def paced():
        steps.append(1)
        assert len(steps) < 20 or entered.wait(20), "the stream was over too early"
        return step()

    monkeypatch.setattr(server._tokenizer, "encode", slow)
    monkeypatch.setattr(server.thread.engine, "step", paced)

    async def ask():
        parts = [{**BODY, "max_tokens": 200, "ignore_eos": True}]

        async def receive():
            while not parts:
                await asyncio.Event().wait()
            body = json.dumps(parts.pop()).encode()
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message):
            if entered.is_set() and message.get("body"):
                came_meanwhile.append(message)
            if len(came_meanwhile) == 10:
                may_end.set()

        stream = asyncio.create_task(ProxyGuard(server.app())(SCOPE, receive, send))
        (long,) = await post(server.app(), {**BODY, "prompt": "b" * 40})
        await stream
        return long

    alike(asyncio.run(asyncio.wait_for(ask(), 60)))
    assert len(came_meanwhile) >= 10
