"""The proxy refuses what replicas have just had no place for, and nothing else."""

import asyncio

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from moeyard.errors import RequestError
from moeyard.serving.api.responses import error_response
from moeyard.serving.proxy.backpressure import PROBE_AFTER_S, REFUSED, Backpressure
from moeyard.serving.proxy_guard import ProxyGuard
from moeyard.serving.serve_args import ServeArgs
from moeyard.serving.server import Server

from http_calls import call, check_error

PATH = "/v1/completions"


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def full(clock):
    backpressure = Backpressure(clock)
    backpressure.hear_end(PATH, 200)  # ended before, so its place is not free now
    backpressure.hear_end(PATH, 429)
    return backpressure


def goes_through(backpressure, path=PATH) -> bool:
    try:
        backpressure.check(path)
    except RequestError as error:
        assert error.status == 429 and error.retry_after_s >= 1
        return False
    return True


def test_nothing_is_refused_before_a_replica_has_refused(clock):
    backpressure = Backpressure(clock)
    for status in (200, None, 400, 503):
        backpressure.hear_end(PATH, status)
        assert goes_through(backpressure)


def test_each_end_of_an_answer_lets_one_request_through(full):
    assert not goes_through(full)
    for status in (200, None):  # None: its client left before it began
        full.hear_end(PATH, status)
    assert [goes_through(full) for _ in range(4)] == [True, True, False, False]


@pytest.mark.parametrize("status", [200, 400, 401, 404, 503, None])
def test_a_request_gives_back_what_it_took_however_it_ends(full, status):
    full.hear_end(PATH, 200)
    for _ in range(5):
        assert goes_through(full) and not goes_through(full)
        full.hear_end(PATH, status)


@pytest.mark.parametrize("status", [400, 429])
def test_a_probe_that_found_no_place_leaves_the_count_as_it_was(full, clock, status):
    for _ in range(3):
        clock.now += PROBE_AFTER_S
        assert full.check(PATH)
        full.hear_end(PATH, status, is_probe=True)
        clock.now += 0.1
    full.hear_end(PATH, 200)
    assert [goes_through(full) for _ in range(2)] == [True, False]


def test_the_place_of_a_probe_is_in_the_count_afterwards(full, clock):
    clock.now += PROBE_AFTER_S
    assert full.check(PATH)
    full.hear_start(PATH)
    full.hear_end(PATH, 200, is_probe=True)
    assert [full.check(PATH) for _ in range(3)] == [False, True, True]
    assert not goes_through(full)


def test_a_place_that_a_request_did_not_get_is_not_counted_again(full):
    """Ray may send a request to the one replica that is full; a probe finds the place later."""
    full.hear_end(PATH, 200)
    assert goes_through(full)
    full.hear_end(PATH, 429)
    assert not goes_through(full)


def test_places_that_others_freed_outlast_a_refusal(full):
    for _ in range(3):
        full.hear_end(PATH, 200)
    assert goes_through(full)
    full.hear_end(PATH, 429)
    assert [goes_through(full) for _ in range(3)] == [True, True, False]


def test_one_probe_goes_through_after_a_while(full, clock):
    clock.now += PROBE_AFTER_S
    assert [goes_through(full) for _ in range(3)] == [True, False, False]
    full.hear_end(PATH, 429)
    clock.now += PROBE_AFTER_S - 1
    assert not goes_through(full)


def test_probes_that_find_places_bring_more_until_one_finds_none(full, clock):
    """A new replica with 20 places: they are found in few steps, and one probe is too many."""
    places, let_through = 20, 0
    clock.now += PROBE_AFTER_S
    for _ in range(6):
        taken = 0
        while goes_through(full):
            taken += 1
        for number in range(taken):
            if let_through + number < places:
                full.hear_start(PATH)
            else:
                full.hear_end(PATH, 429, is_probe=True)
        let_through += taken
        if let_through >= places:
            break
    assert places <= let_through <= 31
    assert not goes_through(full)


def test_only_requests_that_take_places_are_refused_and_only_those_of_the_full_application(full):
    for path in ("/health", "/metrics", "/v1/models", "/two/v1/completions", "/-/healthz"):
        assert goes_through(full, path), path
    assert not goes_through(full, "/v1/chat/completions")


def test_what_is_refused_is_told_once_and_for_its_application(full):
    assert [goes_through(full) for _ in range(3)] == [False] * 3
    assert full.take_refused("/two/metrics") == 0
    assert full.take_refused("/metrics") == 3
    assert full.take_refused(PATH) == 0


class Replicas:
    """An application with one place, which tells what it was asked."""

    def __init__(self):
        self.asked = []
        self.is_full = True

    def app(self):
        async def complete(request):
            self.asked.append(dict(request.scope["headers"]).get(REFUSED))
            await request.body()
            if self.is_full:
                return error_response(RequestError("full", status=429, retry_after_s=1))
            return JSONResponse({"usage": {}})

        return ProxyGuard(Starlette(routes=[Route(PATH, complete, methods=["POST"])]))


def send(app, *bodies, headers=None):
    async def go():
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return [await client.post(PATH, json=body, headers=headers) for body in bodies]

    return asyncio.run(go())


def test_the_guard_repeats_a_refusal_without_a_call_and_tells_how_often(clock):
    replicas = Replicas()
    app = replicas.app()
    app._backpressure = Backpressure(clock)
    answers = send(app, {}, {}, {}, headers={REFUSED.decode(): "999"})
    assert len(replicas.asked) == 1, "one refusal is enough to know"
    for answer in answers[1:]:
        check_error(answer, 429, "busy with as many answers as it takes")
        assert answer.headers["retry-after"] == "1"
    replicas.is_full = False
    clock.now += PROBE_AFTER_S
    assert send(app, {})[0].status_code == 200
    assert replicas.asked == [None, b"2"], "a client's own header must not arrive"


def test_a_refusal_of_several_answers_does_not_refuse_a_single_one():
    replicas = Replicas()
    app = replicas.app()
    send(app, {"n": 60})
    replicas.is_full = False
    assert send(app, {})[0].status_code == 200


def test_the_proxys_refusals_are_in_the_metrics(model_folder):
    server = Server(ServeArgs(model=str(model_folder)))
    try:
        headers = {REFUSED.decode(): "5"}
        text = call(server, "GET", "/metrics", headers=headers).text
        assert 'moeyard_requests_rejected_total{reason="queue_full"} 5.0' in text
    finally:
        server.close()
