"""Only whole requests go on to a replica, and every response ends, if need be in an error."""

import asyncio
import json

import httpx
import pytest
from starlette.responses import JSONResponse

from moeyard.serving.api import request_body
from moeyard.serving.proxy.places import HEADER as TICKET
from moeyard.serving.proxy_guard import UNFINISHED, ProxyGuard, middlewares
from moeyard.serving.relay.frames import HEADER

from http_calls import check_error, events

START = {"type": "http.response.start", "status": 200}
STREAM = {**START, "headers": [(b"content-type", b"text/event-stream; charset=utf-8")]}
JSON = {**START, "headers": [(b"content-type", b"application/json")]}


def body(content, more):
    return {"type": "http.response.body", "body": content, "more_body": more}


def part(content, more=True):
    return {"type": "http.request", "body": content, "more_body": more}


def run(app, came, path="/v1/completions", headers=()):
    """Send a request, of which ``came`` arrives, through the guard; return what it answers."""
    sent = []
    left = list(came)

    async def send(message):
        sent.append(message)

    async def receive():
        if not left:
            await asyncio.Event().wait()
        return left.pop(0)

    (guard,) = middlewares()
    scope = {"type": "http", "method": "POST", "path": path, "headers": list(headers)}
    asyncio.run(guard.cls(app)(scope, receive, send))
    return sent


def answer(*messages, path="/v1/completions"):
    """Return what becomes of ``messages`` of the application."""

    async def app(scope, receive, send):
        for message in messages:
            await send(message)

    return run(app, [part(b"", more=False)], path)


def as_response(sent):
    content = b"".join(m["body"] for m in sent[1:])
    return httpx.Response(sent[0]["status"], headers=sent[0]["headers"], content=content)


def test_a_stream_that_breaks_off_ends_with_an_error_event_and_done():
    event = b'data: {"a": 1}\n\n'
    sent = answer(STREAM, body(event, True), body(event, True))
    assert not sent[-1].get("more_body", False)
    first, second, error, done = events(as_response(sent))
    assert first == second == '{"a": 1}' and done == "[DONE]"
    described = json.loads(error)["error"]
    assert "lost the process" in described["message"] and described["code"] == "unavailable"
    assert set(described) == {"message", "type", "param", "code"}


def test_a_request_without_any_response_gets_503_to_try_again():
    response = as_response(answer())
    check_error(response, 503, "lost the process that worked on this request; send it again")
    assert int(response.headers["retry-after"]) >= 1


@pytest.mark.parametrize(
    "messages",
    [
        (STREAM, body(b"data: [DONE]\n\n", True), body(b"", False)),
        (JSON, body(b"{}", False)),
        (JSON, body(b"{", True)),  # half a JSON object stays half, and the connection is dropped
    ],
    ids=["stream", "whole", "half_json"],
)
def test_other_responses_pass_unchanged(messages):
    assert answer(*messages) == list(messages)


def test_what_is_no_http_passes_unchanged():
    seen = []

    async def app(scope, receive, send):
        seen.append((scope, receive, send))

    asyncio.run(ProxyGuard(app)({"type": "lifespan"}, "receive", "send"))
    assert seen == [({"type": "lifespan"}, "receive", "send")]


async def refuse_to_run(scope, receive, send):
    raise AssertionError("the request reached the application")


def test_a_request_goes_on_when_it_is_whole_and_in_one_piece():
    seen = []

    async def app(scope, receive, send):
        seen.append(await receive())
        await JSONResponse({})(scope, receive, send)

    run(app, [part(b"ab"), part(b""), part(b"c", more=False)])
    assert seen == [part(b"abc", more=False)]


def test_a_body_that_does_not_come_in_time_is_refused_and_the_connection_closed(monkeypatch):
    monkeypatch.setattr(request_body, "BODY_TIMEOUT_S", 0.05)
    response = as_response(run(refuse_to_run, [part(b"ab")]))
    check_error(response, 408, "did not come whole within 0.05 s (of the body, 2 bytes came)")
    assert response.headers["connection"] == "close"


def test_a_body_that_is_too_large_goes_no_further():
    too_much = [part(b"a" * request_body.MAX_BODY_BYTES), part(b"a")]
    check_error(as_response(run(refuse_to_run, too_much)), 413, "larger than 1048576 bytes")


def test_a_client_that_leaves_before_its_body_is_whole_is_forgotten():
    assert run(refuse_to_run, [part(b"a"), {"type": "http.disconnect"}]) == []


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_errors_in_rays_own_words_become_ours(status):
    start = {"type": "http.response.start", "status": status}
    words = {**start, "headers": [[b"content-type", b"text/plain; charset=utf-8"]]}
    response = as_response(answer(words, body(b"no\nreplica", False)))
    check_error(response, status, "no replica")
    assert ("retry-after" in response.headers) == (status in (429, 503))
    assert answer(words, body(b"no", False), path="/-/healthz") == [words, body(b"no", False)]


def test_ray_takes_no_orders_from_clients():
    seen = []

    async def app(scope, receive, send):
        seen.extend(scope["headers"])
        await JSONResponse({})(scope, receive, send)

    kept = [(b"authorization", b"Bearer k"), (b"x-request-id", b"a1")]
    orders = [
        (b"x-request-disconnect-disabled", b"?1"),
        (b"X-Request-Timeout-Seconds", b"0.001"),
        (b"serve_multiplexed_model_id", b"m"),
        (b"x-session-id", b"s"),
        (b"X_Moeyard_Relay", b"moeyard-0.0"),
        (b"x-request-id", b"\xff"),
    ]
    run(app, [part(b"", more=False)], headers=[*kept, *orders])
    (offer,) = [value for name, value in seen if name == HEADER]
    ticket = (TICKET, b"0 ")  # of none; the router learns which application is there
    assert seen == [*kept, ticket, (HEADER, offer)], "an order came through"


def test_how_much_is_unfinished_is_told_to_those_with_rays_token(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "t")
    whole = [part(b"", more=False)]
    token = [(b"authorization", b"Bearer t")]
    found = as_response(run(refuse_to_run, whole, UNFINISHED, token))
    assert found.json() == {"unfinished": 0}

    async def app(scope, receive, send):
        await JSONResponse({"detail": "unknown"}, 404)(scope, receive, send)

    for headers in ([], [(b"authorization", b"Bearer x")]):
        assert as_response(run(app, whole, UNFINISHED, headers)).status_code == 404
