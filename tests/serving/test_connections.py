"""What a client may take of the proxy, over real sockets: time, memory and connections."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from unittest.mock import Mock

import httpx
import pytest
import uvicorn

from moeyard.serving.api import connections, request_body
from moeyard.serving.api.connections import MAX_WAITING_PER_CLIENT, Connection, Connections
from moeyard.serving.proxy_guard import ProxyGuard

POST = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n"
LARGE = 8 << 20
"""More than the kernel keeps for a client that does not read."""


class Application:
    """Answers immediately; under /large with more than a client's kernel takes."""

    def __init__(self) -> None:
        self.num_running = self.num_begun = 0

    async def __call__(self, scope, receive, send):
        self.num_running += 1
        self.num_begun += 1
        try:
            await receive()
            start = {"type": "http.response.start", "status": 200}
            await send({**start, "headers": [(b"content-type", b"text/event-stream")]})
            pieces = LARGE >> 16 if scope["path"] == "/large" else 1
            for _ in range(pieces):
                await send({"type": "http.response.body", "body": b"a" * 65536, "more_body": True})
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})
        finally:
            self.num_running -= 1


@pytest.fixture
def server(monkeypatch):
    """uvicorn with the watched connections and the guard."""
    monkeypatch.setattr(connections, "SWEEP_EVERY_S", 0.05)
    monkeypatch.setattr(connections, "MAX_WAITING_PER_CLIENT", 3)
    application = Application()
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        ProxyGuard(application), http=Connection, lifespan="off", log_config=None
    )
    running = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(running.serve([listener])))
    thread.start()
    application.address = listener.getsockname()
    yield application
    running.should_exit = running.force_exit = True
    thread.join()
    listener.close()


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(request_body, "BODY_TIMEOUT_S", 0.4)
    monkeypatch.setattr(connections, "FREE_S", 0.1)


def send(server, content):
    """Connect and send; what comes back within the server's patience can be read."""
    client = socket.create_connection(server.address, timeout=10)
    client.sendall(content)
    return client


def all_of(client) -> bytes:
    """Return what comes until the server closes the connection."""
    content = b""
    with contextlib.suppress(ConnectionError):
        while piece := client.recv(65536):
            content += piece
    client.close()
    return content


def error_of(client, status) -> dict:
    head, _, content = all_of(client).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d" % status), head
    assert b"connection: close" in head.lower()
    return json.loads(content)["error"]


def answers(server) -> bool:
    return httpx.post("http://{}:{}/".format(*server.address), content="a" * 10).status_code == 200


@pytest.mark.parametrize(
    ("content", "what"),
    [(POST[:20], "of the head, 20 bytes"), (POST + b"{", "of the body, 1 bytes")],
    ids=["head", "body"],
)
def test_a_request_that_does_not_come_whole_gets_408(server, impatient, content, what):
    error = error_of(send(server, content), 408)
    assert what in error["message"] and error["code"] == "request_timeout"
    assert set(error) == {"message", "type", "param", "code"}
    assert answers(server)


def test_a_request_that_trickles_gets_no_more_time(server, impatient):
    client = send(server, POST)
    with contextlib.suppress(ConnectionError):
        for _ in range(9):
            client.sendall(b"a")
            time.sleep(0.1)
    assert error_of(client, 408)["code"] == "request_timeout"


def test_a_connection_on_which_nothing_comes_is_closed(server, impatient):
    assert all_of(send(server, b"")) == b""


def test_a_head_without_end_is_refused(server):
    client = send(server, b"GET / HTTP/1.1\r\n")
    with contextlib.suppress(ConnectionError):
        for _ in range(20):
            client.sendall(b"a: " + b"b" * 8000 + b"\r\n")
            time.sleep(0.001)
    assert answers(server)
    head = all_of(client)
    assert head == b"" or head.startswith(b"HTTP/1.1 431"), head


def test_a_client_has_so_many_unfinished_requests_and_the_oldest_make_room(server, monkeypatch):
    monkeypatch.setattr(connections, "FREE_S", 0.1)
    clients = [send(server, POST) for _ in range(8)]
    for client in clients[:5]:
        error = error_of(client, 429)
        assert "too many requests" in error["message"] and error["type"] == "rate_limit_error"
    for client in clients[5:]:
        client.sendall(b"0123456789")
        assert client.recv(20).startswith(b"HTTP/1.1 200")
        client.close()
    assert server.num_begun == 3


def test_requests_that_come_at_once_meet_no_limit(server):
    clients = [send(server, POST + b"0123456789") for _ in range(20)]
    assert all(client.recv(20).startswith(b"HTTP/1.1 200") for client in clients)
    for client in clients:
        client.close()


def test_a_kept_connection_may_rest_and_go_on(server, impatient):
    with httpx.Client(base_url="http://{}:{}".format(*server.address)) as client:
        assert client.post("/", content="a").status_code == 200
        time.sleep(0.8)  # longer than any deadline of a request
        assert client.post("/", content="a").status_code == 200


def test_a_client_that_does_not_read_is_cut_off_and_its_request_ends(server, monkeypatch):
    monkeypatch.setattr(connections, "READ_TIMEOUT_S", 0.3)
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(10)
    client.connect(server.address)
    client.sendall(POST.replace(b"/v1/completions", b"/large") + b"0123456789")
    deadline = time.monotonic() + 20
    while server.num_running == 0:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    while server.num_running > 0:
        assert time.monotonic() < deadline, "the request of a client that does not read goes on"
        time.sleep(0.01)
    client.close()
    assert answers(server)


def test_one_that_reads_slowly_but_steadily_gets_everything(server, monkeypatch):
    monkeypatch.setattr(connections, "READ_TIMEOUT_S", 0.5)
    client = send(server, POST.replace(b"/v1/completions", b"/large") + b"0123456789")
    content = b""
    while b"[DONE]" not in content[-40:]:
        content += client.recv(1 << 17)
        time.sleep(0.01)
    assert content.count(b"a" * 1000) > 0 and len(content) > LARGE
    client.close()


@pytest.mark.parametrize(("late_s", "refused"), [(0.0, 6), (2.0, 0)])
def test_a_loop_that_is_late_itself_blames_no_client(late_s, refused):
    """What it has not read for three seconds may well have come."""
    closed = []

    async def sweep():
        watched = Connections()
        now = asyncio.get_running_loop().time()
        for _ in range(MAX_WAITING_PER_CLIENT + 6):
            connection = Mock(waits_since=now - 3, client_key="one", phase="head")
            connection.transport.is_closing.return_value = False
            connection.refuse = closed.append
            watched._open.add(connection)
        watched._due = now - late_s
        watched._sweep()

    asyncio.run(sweep())
    assert len(closed) == refused
