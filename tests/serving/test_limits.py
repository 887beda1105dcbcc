"""Limits of a server: it admits nothing that it cannot hold."""

import asyncio
import threading
from typing import get_args

import httpx
import pytest
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.parser import text_string_to_metric_families

from moeyard.errors import RequestError
from moeyard.serving.api import request_body
from moeyard.serving.engine.admission import Admission, Rejection
from moeyard.serving.serve_args import ServeArgs
from moeyard.serving.server import Server

from http_calls import call, check_error, client_of

BODY = {"model": "small", "prompt": "ab", "max_tokens": 4, "temperature": 0}


@pytest.fixture
def server(model_folder):
    running = Server(ServeArgs(model=str(model_folder), max_num_seqs=4, max_queued_requests=2))
    yield running
    running.close()


def held_back(server) -> threading.Event:
    """Let no step of the engine begin before the event is set."""
    step, may_run = server.thread.engine.step, threading.Event()
    server.thread.engine.step = lambda: may_run.wait(30) and step()
    return may_run


def rejected(server) -> dict[str, float]:
    families = text_string_to_metric_families(call(server, "GET", "/metrics").text)
    samples = [sample for family in families for sample in family.samples]
    name = "moeyard_requests_rejected_total"
    counts = {s.labels["reason"]: s.value for s in samples if s.name == name}
    assert counts.keys() == set(get_args(Rejection)), "a series is missing at the start"
    return {reason: count for reason, count in counts.items() if count}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_burst_fills_the_batch_and_the_queue_exactly(server, stream):
    may_run = held_back(server)

    async def burst():
        async with client_of(server.app()) as client:
            body = {**BODY, "stream": stream}
            posts = [client.post("/v1/completions", json=body) for _ in range(24)]
            tasks = [asyncio.create_task(post) for post in posts]
            while sum(task.done() for task in tasks) < 18:
                await asyncio.sleep(0.001)
            late = asyncio.create_task(client.post("/v1/completions", json=body))
            await asyncio.wait([late], timeout=5)
            may_run.set()
            return await asyncio.gather(*tasks, late)

    answers = asyncio.run(burst())
    assert sorted(answer.status_code for answer in answers) == [200] * 6 + [429] * 19
    for answer in answers:
        if answer.status_code == 429:
            error = check_error(answer, 429, "busy with 6 answers and takes 6 at a time")
            assert error["code"] == "rate_limit_exceeded"
            assert int(answer.headers["retry-after"]) >= 1
    assert rejected(server) == {"queue_full": 19}
    assert call(server, "POST", "/v1/completions", json=BODY).status_code == 200


def test_every_answer_of_a_request_takes_a_place(server):
    may_run = held_back(server)

    async def fill():
        async with client_of(server.app()) as client:

            async def ask(**changes):
                return await client.post("/v1/completions", json={**BODY, **changes})

            first = asyncio.create_task(ask(prompt=["a", "b"], n=2))  # four of six places
            while server.admission.num_open == 0:
                await asyncio.sleep(0.001)
            refused = await ask(n=3)
            second = asyncio.create_task(ask(n=2))
            while server.admission.num_open == 1:
                await asyncio.sleep(0.001)
            full = await ask()
            may_run.set()
            return await first, refused, await second, full

    first, refused, second, full = asyncio.run(fill())
    assert len(first.json()["choices"]) == 4 and len(second.json()["choices"]) == 2
    check_error(refused, 429, "busy with 4 answers")
    check_error(full, 429, "busy with 6 answers")


def test_more_answers_than_there_are_places_can_never_be_served(server):
    answer = call(server, "POST", "/v1/completions", json={**BODY, "n": 7})
    assert check_error(answer, 400, "asks for 7 answers, but the server takes 6")["param"] == "n"


def test_a_request_that_is_refused_or_fails_gives_its_place_back(server):
    for _ in range(8):
        bad = call(server, "POST", "/v1/completions", json={**BODY, "prompt": [999]})
        check_error(bad, 400, "token id 999")
    assert server.admission.num_open == 0
    assert call(server, "POST", "/v1/completions", json={**BODY, "n": 6}).status_code == 200


def test_a_client_gone_before_its_stream_began_gives_its_place_back(server):
    async def receive():
        return {"type": "http.request", "body": httpx.Request("POST", "/", json=body).content}

    async def send(_):
        raise OSError("the client has gone")

    body = {**BODY, "stream": True, "n": 6}
    scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}, "method": "POST"}
    scope |= {"path": "/v1/completions", "headers": [], "query_string": b""}
    with pytest.raises(Exception):  # noqa: B017 (whatever the framework makes of it)
        asyncio.run(server.app()(scope, receive, send))
    assert server.admission.num_open == 0
    assert call(server, "POST", "/v1/completions", json={**BODY, "n": 6}).status_code == 200


def test_a_draining_server_lets_nobody_in_and_finishes_what_it_has(server):
    may_run = held_back(server)

    async def drain():
        async with client_of(server.app()) as client:
            begun = asyncio.create_task(client.post("/v1/completions", json=BODY))
            while server.admission.num_open == 0:
                await asyncio.sleep(0.001)
            server.admission.drain()
            late = await client.post("/v1/completions", json=BODY)
            health = await client.get("/health")
            may_run.set()
            return await begun, late, health

    begun, late, health = asyncio.run(drain())
    assert begun.status_code == 200
    check_error(late, 503, "shutting down")
    assert int(late.headers["retry-after"]) >= 1
    assert health.status_code == 503 and health.json()["status"] == "draining"
    assert int(health.headers["retry-after"]) >= 1
    assert rejected(server) == {"draining": 1} and server.admission.num_open == 0


def test_unfinished_bodies_hold_no_place_and_end_in_408(server, monkeypatch):
    monkeypatch.setattr(request_body, "BODY_TIMEOUT_S", 0.2)

    async def endless():
        yield b"{"
        await asyncio.Event().wait()

    async def post_many():
        async with client_of(server.app()) as client:
            path = "/v1/completions"
            late = [asyncio.create_task(client.post(path, content=endless())) for _ in range(30)]
            await asyncio.sleep(0)
            whole = await asyncio.gather(*(client.post(path, json=BODY) for _ in range(6)))
            return whole, await asyncio.gather(*late)

    whole, late = asyncio.run(post_many())
    assert [answer.status_code for answer in whole] == [200] * 6
    for answer in late:
        assert check_error(answer, 408, "did not come whole within")["code"] == "request_timeout"
        assert answer.headers["connection"] == "close"


def test_large_headers_are_refused_before_the_key_is_looked_at(server):
    headers = {"x-large": "a" * 20_000, "authorization": "Bearer " + "b" * 20_000}
    check_error(call(server, "GET", "/v1/models", headers=headers), 431, "may have 32768")
    check_error(call(server, "GET", "/health", headers=headers), 431, "may have 32768")
    headers = {"x-large": "a" * 20_000}
    assert call(server, "GET", "/v1/models", headers=headers).status_code == 200


def test_without_a_queue_the_batch_is_all_there_is():
    rejected = Counter("rejected", "", ["reason"], registry=CollectorRegistry())
    admission = Admission(2, 0, rejected)
    with admission.places(1), admission.places(1):
        with pytest.raises(RequestError) as caught, admission.places(1):
            raise AssertionError("let in")
        assert caught.value.status == 429
    with admission.places(2):
        pass


def test_refusals_are_counted_by_reason(server):
    assert call(server, "POST", "/v1/completions", json={"model": "small"}).status_code == 400
    assert (
        call(server, "POST", "/v1/completions", json={**BODY, "model": "other"}).status_code == 404
    )
    assert call(server, "GET", "/nowhere").status_code == 404
    assert call(server, "GET", "/v1/completions").status_code == 405
    large = {**BODY, "prompt": "a" * (request_body.MAX_BODY_BYTES + 1)}
    assert call(server, "POST", "/v1/completions", json=large).status_code == 413
    assert call(server, "POST", "/v1/completions", json=BODY).status_code == 200
    assert rejected(server) == {"bad_request": 1, "not_found": 3, "too_large": 1}


def test_pages_of_permitted_origins_may_call_and_others_may_not(model_folder):
    page = "http://localhost:3000"
    args = ServeArgs(model=str(model_folder), api_key="k", cors_origin=f"{page},https://b.org")
    running = Server(args)
    try:

        async def ask(method, origin, key, **more):
            asked = {"Origin": origin, **more}
            asked |= {"Authorization": f"Bearer {key}"} if key else {}
            async with client_of(running.app()) as client:
                return await client.request(method, "/v1/models", headers=asked)

        wants = {
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang",
        }
        may = asyncio.run(ask("OPTIONS", page, None, **wants))
        assert may.status_code == 200 and may.headers["access-control-allow-origin"] == page
        assert "x-stainless-lang" in may.headers["access-control-allow-headers"]
        assert asyncio.run(ask("OPTIONS", "http://evil.org", None, **wants)).status_code == 400
        answer = asyncio.run(ask("GET", page, "k"))
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == page
        refused = asyncio.run(ask("GET", page, None))
        assert refused.status_code == 401, "the key is still needed"
        assert refused.headers["access-control-allow-origin"] == page, "so that pages see why"
        other = asyncio.run(ask("GET", "http://evil.org", "k"))
        assert "access-control-allow-origin" not in other.headers
        assert rejected_by(running) == {"no_key": 1}
    finally:
        running.close()


def rejected_by(running) -> dict[str, float]:
    families = text_string_to_metric_families(running.metrics.render().decode())
    samples = [sample for family in families for sample in family.samples]
    name = "moeyard_requests_rejected_total"
    return {s.labels["reason"]: s.value for s in samples if s.name == name and s.value}


@pytest.mark.parametrize("origin", ["localhost:3000", "http://a.org/path", "http://", "a b"])
def test_what_is_no_origin_is_refused(model_folder, origin):
    with pytest.raises(ValueError, match="is no origin; use SCHEME://HOST"):
        ServeArgs(model=str(model_folder), cors_origin=[origin])
