"""A response that nobody finished ends in an error; one that was finished is left alone."""

import asyncio
import json

import httpx
import pytest

from moeyard.serving.proxy_guard import ProxyGuard, middlewares

from http_calls import check_error, events

START = {"type": "http.response.start", "status": 200}
STREAM = {**START, "headers": [(b"content-type", b"text/event-stream; charset=utf-8")]}
JSON = {**START, "headers": [(b"content-type", b"application/json")]}


def body(content, more):
    return {"type": "http.response.body", "body": content, "more_body": more}


def answer(*messages):
    """Send a request through the guard to an application that sends ``messages`` and returns."""
    sent = []

    async def app(scope, receive, send):
        for message in messages:
            await send(message)

    async def send(message):
        sent.append(message)

    async def receive():
        raise AssertionError("nothing to receive")

    (guard,) = middlewares()
    asyncio.run(guard.cls(app)({"type": "http"}, receive, send))
    return sent


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
