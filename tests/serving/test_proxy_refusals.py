"""The guard refuses what finds no place, and Ray's router follows its tickets."""

import asyncio
from types import SimpleNamespace
from weakref import WeakValueDictionary

import httpx
import pytest
from ray.cloudpickle import cloudpickle
from ray.serve._private.common import DeploymentHandleSource, DeploymentID
from ray.serve.request_router import ReplicaID
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from moeyard.errors import RequestError
from moeyard.serving import proxy_guard
from moeyard.serving.proxy.applications import Applications, ticket_header
from moeyard.serving.proxy.places import (
    HEADER,
    REFUSED,
    Places,
    Room,
)
from moeyard.serving.proxy_guard import ProxyGuard
from moeyard.serving.replicas.places_router import (
    CROWD,
    ORIGINS,
    PLACES,
    PlacesRouter,
    places_routing,
)
from moeyard.serving.serve_args import ServeArgs
from moeyard.serving.server import Server

from http_calls import call, check_error

PATH = "/v1/completions"


@pytest.fixture
def places():
    """Two replicas of three places."""
    found = Places()
    found.set_replicas({"a": Room(3, is_near=True), "b": Room(3, is_near=True)})
    return found


def take_all(places):
    """Take as often as there is room; return the replicas."""
    found = []
    with pytest.raises(RequestError):
        while True:
            found.append(places.take(1).replica)
    return found


def replica(name):
    return SimpleNamespace(
        replica_id=ReplicaID(name, DeploymentID("moeyard", "app")),
        replica_metadata={PLACES: 3, CROWD: 7, ORIGINS: ["http://page"]},
        node_id="node",
        push_proxy_handle=lambda _: None,
    )


async def routed(router, ticket):
    """Return the names of replicas that a router would ask, by rank."""
    request = SimpleNamespace(
        metadata=SimpleNamespace(session_id=ticket),
        routing_context=SimpleNamespace(should_backoff=False),
    )
    ranks = await router.choose_replicas(list(router.curr_replicas.values()), request)
    assert request.routing_context.should_backoff
    return [[one.replica_id.unique_id for one in rank] for rank in ranks]


def test_the_router_tells_of_replicas_and_follows_tickets(monkeypatch):
    known = Applications()
    monkeypatch.setattr("moeyard.serving.proxy.applications.applications", known)
    routing = places_routing()
    monkeypatch.setattr(cloudpickle, "_DYNAMIC_CLASS_TRACKER_BY_ID", WeakValueDictionary())
    copied = routing.get_request_router_class()
    assert copied is not PlacesRouter, "another process gets a copy of the class"

    async def go():
        router = copied(
            deployment_id=DeploymentID("moeyard", "app"),
            handle_source=DeploymentHandleSource.REPLICA,
            self_node_id="node",
        )
        monkeypatch.setattr(router, "_probe_queue_lens", lambda *_: asyncio.sleep(0))
        router.initialize_state()
        a, b, older = replica("a"), replica("b"), replica("older")
        older.replica_metadata = {}
        router.update_replicas([older])
        assert await routed(router, ticket_header(None, "/one").decode()) == [[], ["older"]]
        assert known.find("/one").take(1).replica == "", "only Ray knows of it"
        router.update_replicas([a, b])
        assert await routed(router, ticket_header(None, "/one").decode()) == [[], ["a", "b"]]
        places = known.find("/one")
        assert (places.crowd, places.origins) == (7, ["http://page"])
        ticket = places.take(1)
        header = ticket_header(ticket, None).decode()
        first, other = ticket.replica, {"a": "b", "b": "a"}[ticket.replica]
        assert await routed(router, header) == [[first], [other]]
        request = SimpleNamespace(metadata=SimpleNamespace(session_id=header))
        moved_to = {"a": a, "b": b}[other].replica_id
        router.on_new_queue_len_info(moved_to, 1)
        router.on_request_routed(request, moved_to, None)
        assert await routed(router, header) == [[other], [first]]
        for odd in ("", "x", "-1", "7 7 7", "\u00b2"):
            assert (await routed(router, odd))[0] == [], odd
        router.on_new_queue_len_info(a.replica_id, 3 + (ticket.replica == "a"))
        assert take_all(places) == ["b"] * (2 + (ticket.replica == "a"))
        router.on_replica_actor_died(b.replica_id)
        assert list(places._rooms) == ["a"]

    asyncio.run(go())


class Replicas:
    """An application behind the guard, which holds requests until it is told to answer."""

    def __init__(self, places, monkeypatch):
        known = Applications()
        known.learn("", places)
        monkeypatch.setattr(proxy_guard, "applications", known)
        self.headers, self.may_answer = [], asyncio.Event()

    async def complete(self, request):
        self.headers.append(dict(request.scope["headers"]))
        await self.may_answer.wait()
        return JSONResponse({"usage": {}})

    def app(self):
        return ProxyGuard(Starlette(routes=[Route(PATH, self.complete, methods=["POST"])]))


def test_the_guard_refuses_without_a_call_and_tells_how_often(places, monkeypatch):
    async def go():
        replicas = Replicas(places, monkeypatch)
        transport = httpx.ASGITransport(app=replicas.app())
        forged = {REFUSED.decode(): "999", HEADER.decode(): "1 /mine"}
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:

            async def ask(**body):
                return await client.post(PATH, json=body, headers=forged)

            held = [asyncio.create_task(ask(n=2)) for _ in range(3)]
            done, _ = await asyncio.wait(held, return_when=asyncio.FIRST_COMPLETED)
            (refused,) = done
            check_error(refused.result(), 429, "no room for 2 answers of one request at the moment")
            assert refused.result().headers["retry-after"] == "1"
            assert len(replicas.headers) == 2
            replicas.may_answer.set()
            await asyncio.wait(held)
            assert (await ask(n=3)).status_code == 200
        return replicas.headers

    headers = asyncio.run(go())
    assert [own.get(REFUSED) for own in headers] == [None, None, b"1"]
    numbers = [own[HEADER].decode().split(" ") for own in headers]
    assert len({number for number, _ in numbers}) == 3, "each request has its own ticket"
    assert {prefix for _, prefix in numbers} == {""} and not places._tickets


@pytest.mark.parametrize("is_lost", [False, True], ids=["whole", "lost"])
def test_a_client_that_asks_again_at_once_finds_its_place_free(monkeypatch, is_lost):
    """Ray's application returns a while after the last piece of a response, and the guard after
    the piece that it adds itself."""
    places, statuses = Places(), []
    places.set_replicas({"a": Room(1, is_near=True)})
    replicas = Replicas(places, monkeypatch)
    replicas.may_answer.set()
    plain = Starlette(routes=[Route(PATH, replicas.complete, methods=["POST"])])

    async def app(scope, receive, send):
        if is_lost:
            return
        await plain(scope, receive, send)
        await asyncio.sleep(0.02)

    async def ask(left):
        async def send(message):
            if message["type"] == "http.response.start":
                statuses.append(message["status"])
            elif left > 1:
                again.append(asyncio.create_task(ask(left - 1)))
                await asyncio.sleep(0.01)

        async def receive():
            return {"type": "http.request", "body": b"{}", "more_body": False}

        scope = {"type": "http", "method": "POST", "path": PATH, "headers": []}
        await guard(scope, receive, send)

    async def go():
        await ask(3)
        while again:
            await again.pop()

    guard, again = ProxyGuard(app), []
    asyncio.run(go())
    assert statuses == [503 if is_lost else 200] * 3 and not places._tickets


def ask_guard(app, path=PATH, method="POST", headers=(), left=False):
    """Send a whole request through the guard; return the status and the headers of the answer."""
    sent = []
    came = [{"type": "http.request", "body": b"{}", "more_body": False}]

    async def send(message):
        sent.append(message)

    async def receive():
        return came.pop(0) if came else {"type": "http.disconnect"}

    scope = {"type": "http", "method": method, "path": path, "headers": list(headers)}
    asyncio.run(ProxyGuard(app)(scope, receive, send))
    return sent[0]["status"], {name.decode(): value.decode() for name, value in sent[0]["headers"]}


def test_refusals_are_told_until_a_replica_has_heard_of_them(places, monkeypatch):
    Replicas(places, monkeypatch)
    take_all(places)
    told = []

    def answering(*messages, leaves=False):
        async def app(scope, receive, send):
            told.append((scope["path"], scope["method"], dict(scope["headers"]).get(REFUSED)))
            for _ in range(2 * leaves):
                await receive()
            for message in messages:
                await send(message)

        return app

    start = {"type": "http.response.start", "headers": [(b"content-type", b"text/plain")]}
    end = {"type": "http.response.body", "body": b""}
    models = "/v1/models"
    ask_guard(answering({**start, "status": 200}, end), "/-/healthz", "GET")  # Ray's own
    ask_guard(answering({**start, "status": 200}, end), models, "OPTIONS")  # answered before
    ask_guard(answering(), models)
    ask_guard(answering({**start, "status": 503}, end), models)
    ask_guard(answering(leaves=True), models)  # the replica may have heard
    assert [count for *_, count in told] == [None, None, b"1", b"1", b"1"], told
    assert places.take_refused() == 0


def test_pages_that_may_call_can_read_refusals_and_ask_for_permission(places, monkeypatch):
    replicas = Replicas(places, monkeypatch)
    places.origins = ["http://page"]
    take_all(places)
    page = [(b"origin", b"http://page")]
    status, headers = ask_guard(replicas.app(), headers=page)
    assert status == 429 and headers["access-control-allow-origin"] == "http://page"
    assert "retry-after" in headers["access-control-expose-headers"]
    _, headers = ask_guard(replicas.app(), headers=[(b"origin", b"http://other")])
    assert "access-control-allow-origin" not in headers
    status, _ = ask_guard(replicas.app(), method="OPTIONS", headers=page)
    assert status == 405, "it reached the application, though there is no place"


def test_a_full_application_at_the_root_refuses_nothing_of_another_one(places, monkeypatch):
    replicas = Replicas(places, monkeypatch)
    take_all(places)
    status, _ = ask_guard(replicas.app(), "/other" + PATH)
    assert status == 404, "it reached Ray, which knows all applications"
    assert places.take_refused() == 1, "the refusal is told under the application's own prefix"


def test_the_proxys_refusals_are_in_the_metrics_and_replicas_know_their_places(model_folder):
    server = Server(ServeArgs(model=str(model_folder), max_num_seqs=3, max_queued_requests=2))
    try:
        assert server.admission.num_places == 5
        headers = {REFUSED.decode(): "5"}
        text = call(server, "GET", "/metrics", headers=headers).text
        assert 'moeyard_requests_rejected_total{reason="queue_full"} 5.0' in text
    finally:
        server.close()
