"""``/v1/forecast`` as clients see it, without Ray."""

import asyncio
import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from seasonal import LONGEST, PERIOD, Seasonal

import moeyard
from moeyard.errors import ConfigError, ExpertReadError
from moeyard.moe.models.forecaster import Forecaster
from moeyard.serving.series import server as series_server
from moeyard.serving.series.args import OF_TEXT
from moeyard.serving.series.server import SeriesServer
from moeyard.serving.serve_args import ServeArgs

from http_calls import KEY, call, check_error, client_of

UP = [1.0, 2.0, 3.0, 5.0] * 3


@pytest.fixture
def start(monkeypatch):
    """Start a server around a model."""
    running = []

    def start(model, **options):
        monkeypatch.setattr(series_server, "open_kind", lambda *_, **__: (Forecaster(model), None))
        own = {"model": "seasonal", "served_model_name": "seasonal", "api_key": "secret"}
        running.append(SeriesServer(ServeArgs(**own, **options)))
        return running[-1]

    yield start
    for server in running:
        server.close()


@pytest.fixture
def server(start):
    return start(Seasonal())


def ask(server, **body):
    return call(server, "POST", "/v1/forecast", json={"series": [UP], "horizon": 2, **body})


def test_who_gets_the_path_learns_what_to_post(server):
    answer = call(server, "GET", "/v1/forecast")
    message = answer.json()["error"]["message"]
    assert answer.status_code == 405 and message.startswith("GET /v1/forecast is not offered; POST")
    body = json.loads(message.partition("such as ")[2].rstrip("."))
    assert ask(server, **body).status_code == 200


def test_quantiles_come_back_for_every_series(server):
    answer = ask(server, series=[UP, [None, 4, 6, None, 8, 9, 7]], quantiles=[0.1, 0.5]).json()
    assert answer["object"] == "forecast" and answer["model"] == "seasonal"
    direct = Forecaster(server.thread.forecaster.model)
    for index, series in enumerate([UP, [4, 6, None, 8, 9, 7]]):
        (expected,) = direct(series, 2, [0.1, 0.5])
        found = answer["data"][index]
        assert found["index"] == index and found["mean"] == expected.mean.tolist()
        assert found["quantiles"] == {
            "0.1": expected.quantiles[0.1].tolist(),
            "0.5": expected.quantiles[0.5].tolist(),
        }
    assert answer["usage"] == {"context_points": 12 + 6, "forecast_points": 4}


def test_a_model_of_points_has_no_quantiles(start):
    server = start(Seasonal(quantiles=False))
    assert ask(server).json()["data"] == [
        {"index": 0, "mean": pytest.approx([1, 2]), "quantiles": None}
    ]
    check_error(ask(server, quantiles=[0.5]), 400, "the model forecasts points and has none")


def test_health_models_and_metrics(server):
    assert call(server, "GET", "/health", headers={}).json() == {"status": "ok"}
    (model,) = call(server, "GET", "/v1/models").json()["data"]
    assert model["id"] == "seasonal" and model["max_model_len"] == LONGEST
    assert call(server, "GET", "/v1/models/seasonal").json() == model
    ask(server, series=[UP, UP])
    families = list(text_string_to_metric_families(call(server, "GET", "/metrics").text))
    samples = [sample for family in families for sample in family.samples]
    total = {}
    for sample in samples:
        total[sample.name] = total.get(sample.name, 0) + sample.value
    assert total["moeyard_forecast_series_total"] == 2
    assert total["moeyard_forecast_context_points_total"] == 2 * len(UP)
    assert total["moeyard_forecast_points_total"] == 4
    # Every point was a row, for two experts.
    assert total["moeyard_moe_tokens_total"] == 2 * len(UP)
    assert total["moeyard_expert_tokens_total"] == 2 * 2 * len(UP)
    assert total["moeyard_requests_finished_total"] == 1
    assert total["moeyard_requests_running"] == 0 == total["moeyard_requests_waiting"]
    assert all(family.documentation for family in families)


BAD_BODIES = {
    "no_series": ({"series": None}, "series is None; give a list of lists"),
    "flat": ({"series": UP}, "give a list of lists of numbers"),
    "empty": ({"series": []}, "series is []"),
    "text": ({"series": [[1, "2"]]}, "series 0 has '2', which is not a number"),
    "flag": ({"series": [[1, True, 2]]}, "series 0 has True"),
    "nested": ({"series": [[[1, 2]]]}, "series 0"),
    "overflow": (b'{"series": [[1, 1e999]], "horizon": 2}', "series 0 is infinite at point 1"),
    "nan": (b'{"series": [[1, NaN]], "horizon": 2}', "the body holds NaN"),
    "huge": ({"series": [[1, 10**400]]}, "series 0"),
    "short": ({"series": [UP, [1]]}, "series 1 has 1 observed point"),
    "tiny": ({"series": [[1e-200, 2e-200, 1e-200, 3e-200]]}, "series 0 varies so little"),
    "gaps": ({"series": [[1, None, None, None, None, 2]]}, "series 0 lacks 4 of the 6 points"),
    "no_horizon": ({"horizon": None}, "horizon is missing"),
    "zero": ({"horizon": 0}, "horizon is 0; use a number from 1 to 4096"),
    "fraction": ({"horizon": 1.5}, "horizon is 1.5; use a whole number"),
    "flag_horizon": ({"horizon": True}, "horizon is True"),
    "far": ({"horizon": 4097}, "asks for 4097 points ahead, but one may have 4096"),
    "quantile": ({"quantiles": [2]}, "quantiles has 2"),
    "quantile_text": ({"quantiles": "0.5"}, "quantiles is '0.5'"),
    "many_quantiles": ({"quantiles": [0.5] * 100}, "asks for 100 quantiles"),
    "context": ({"context": 63}, "context is 63; use a number from 2 to 62"),
    "columns": ({"columns": "a"}, "columns is 'a'; give a list of names"),
    "unknown_column": ({"columns": ["a"]}, "columns has 'a', but the model was trained on"),
    "seed": ({"seed": -1}, "seed is -1"),
    "unknown": ({"horizons": 3}, "body.horizons is not supported; leave it out"),
    "many": ({"series": [[1, 2]] * 257}, "asks for 257 series, but one may have 256"),
    "numbers": ({"series": [[1, 2]] * 256, "horizon": 1024}, "1048576 numbers in the answer"),
    "not_json": (b"{", "the body is not JSON"),
    "a_list": (b"[]", "the body is a list"),
    "deep": (b"[" * 200_000, "nested too deeply"),
}


@pytest.mark.parametrize("case", BAD_BODIES)
def test_a_bad_body_gets_400_and_one_sentence(server, case):
    body, message = BAD_BODIES[case]
    if isinstance(body, bytes):
        response = call(server, "POST", "/v1/forecast", content=body)
    else:
        response = ask(server, **body)
    error = check_error(response, 400, message)
    assert error["type"] == "invalid_request_error"


def test_the_field_is_named(server):
    assert check_error(ask(server, horizon=0), 400, "")["param"] == "horizon"
    assert check_error(ask(server, series=[[1]]), 400, "")["param"] == "series"
    assert check_error(ask(server, quantiles=[2]), 400, "")["param"] == "quantiles"
    assert check_error(ask(server, context=1), 400, "")["param"] == "context"


def test_what_it_does_not_have_is_answered_with_a_sentence(server):
    check_error(ask(server, model="other"), 404, "'other' does not exist; this server has 'seas")
    assert ask(server, model="seasonal").status_code == 200
    for path in ("/v1/completions", "/v1/chat/completions"):
        response = call(server, "POST", path, json={"model": "seasonal", "prompt": "a"})
        check_error(response, 404, "continues time series; use /v1/forecast")
    check_error(call(server, "GET", "/v1/forecast"), 405, "GET /v1/forecast is not offered")
    check_error(call(server, "POST", "/v1/load_lora_adapter", json={}), 404, "is not offered")
    check_error(call(server, "POST", "/v1/forecast", headers={}, json={}), 401, "API key")
    check_error(call(server, "POST", "/v1/forecast", content=b" " * (1 << 21)), 413, "larger")


class Paced(Seasonal):
    """Waits before every batch until it may go on."""

    def __init__(self, **options):
        super().__init__(**options)
        self.entered, self.may_run = threading.Semaphore(0), threading.Semaphore(0)

    def predict(self, *arguments):
        self.entered.release()
        assert self.may_run.acquire(timeout=30)
        return super().predict(*arguments)


async def until(condition):
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.001)


def post(client, **body):
    body = {"series": [UP], "horizon": 2, **body}
    return asyncio.create_task(client.post("/v1/forecast", json=body, headers=KEY))


def test_requests_that_wait_together_are_computed_together(start):
    model = Paced()
    server = start(model, max_num_seqs=4)
    series = [[float(n + m) for m in range(PERIOD)] for n in range(5)]

    async def burst():
        async with client_of(server.app()) as client:
            first = post(client)
            await until(lambda: model.entered.acquire(blocking=False))
            others = [post(client, series=[one]) for one in series]
            others += [post(client, series=[series[0]], horizon=3)]
            await until(lambda: server.admission.num_open == 7)
            await until(lambda: server.thread._new.qsize() == 6)
            for _ in range(4):
                model.may_run.release()
            return [response.json() for response in await asyncio.gather(first, *others)]

    answers = asyncio.run(burst())
    assert [shape[:3] for shape in model.batches] == [(1, 12, 2), (4, 4, 2), (1, 4, 2), (1, 4, 3)]
    for one, answer in zip(series, answers[1:6], strict=True):
        assert answer["data"][0]["mean"] == pytest.approx(one[:2], abs=1e-6)


def test_a_full_server_answers_429_and_a_draining_one_503(start):
    model = Paced()
    server = start(model, max_num_seqs=1, max_queued_requests=1)

    async def burst():
        async with client_of(server.app()) as client:
            held = [post(client), post(client)]
            await until(lambda: server.admission.num_open == 2)
            refused = await post(client)
            server.admission.drain()
            late = await post(client)
            health = await client.get("/health")
            for _ in range(2):
                model.may_run.release()
            return refused, late, health, await asyncio.gather(*held)

    refused, late, health, answered = asyncio.run(burst())
    check_error(refused, 429, "the server is busy")
    check_error(late, 503, "shutting down")
    assert health.status_code == 503 and [a.status_code for a in answered] == [200, 200]
    assert server.admission.num_open == 0


def test_series_of_a_client_that_has_left_are_not_computed(start):
    model = Paced()
    server = start(model, max_num_seqs=1)

    async def leave():
        async with client_of(server.app()) as client:
            gone = post(client, series=[UP] * 3)
            await until(lambda: model.entered.acquire(blocking=False))
            gone.cancel()
            await until(lambda: server.admission.num_open == 0)
            model.may_run.release()
            model.may_run.release()
            return await post(client, horizon=1)

    assert asyncio.run(leave()).status_code == 200
    assert [shape[2] for shape in model.batches] == [2, 1]
    assert server.metrics.cancelled._value.get() == 1


async def answer_next_to_a_good_one(server, model):
    """Return the last answer of a batch whose other request is answered."""
    async with client_of(server.app()) as client:
        first = post(client, horizon=1)
        await until(lambda: model.entered.acquire(blocking=False))
        both = [post(client), post(client, series=[[13.0, 1.0] * 6])]
        await until(lambda: server.thread._new.qsize() == 2)
        for _ in range(4):
            model.may_run.release()
        _, good, bad = await asyncio.gather(first, *both)
    assert good.status_code == 200
    return bad


def test_a_forecast_that_is_not_finite_ends_its_request_alone(start):
    class Overflowing(Paced):
        def predict(self, values_BL, *rest):
            found = super().predict(values_BL, *rest)
            overflows_B1 = (values_BL.abs() == 1).all(dim=1, keepdim=True)
            return found._replace(mean_BH=found.mean_BH.masked_fill(overflows_B1, torch.inf))

    model = Overflowing()
    server = start(model)

    bad = asyncio.run(answer_next_to_a_good_one(server, model))
    assert check_error(bad, 400, "series 0 has a forecast that is not")["param"] == "series"
    assert call(server, "GET", "/health").status_code == 200


def test_near_quantiles_have_names_of_their_own(server):
    (found,) = ask(server, quantiles=[0.1234567, 0.1234568]).json()["data"]
    assert list(found["quantiles"]) == ["0.1234567", "0.1234568"]


def test_an_expert_that_cannot_be_read_ends_the_requests_it_concerns_alone(start):
    class Broken(Paced):
        def predict(self, values_BL, *rest):
            found = super().predict(values_BL, *rest)
            if (values_BL.abs() == 1).all(dim=1).any():
                raise ExpertReadError("expert 3 of layer 0 cannot be read.", [3])
            return found

    model = Broken()
    server = start(model)

    bad = asyncio.run(answer_next_to_a_good_one(server, model))
    check_error(bad, 503, "expert 3 of layer 0 cannot be read")
    assert call(server, "GET", "/health").status_code == 200


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_bug_makes_the_server_unhealthy_and_lets_no_one_wait(start):
    class Buggy(Seasonal):
        def predict(self, *_):
            raise ZeroDivisionError

    server = start(Buggy())
    check_error(ask(server), 503, "forecasts failed (ZeroDivisionError)")
    check_error(ask(server), 503, "forecasts failed")
    assert call(server, "GET", "/health").json()["status"] == "failed"


def test_a_forecast_without_memory_is_refused_with_503(start):
    class Large(Seasonal):
        def predict(self, *_):
            torch.empty(1 << 60)

    server = start(Large())
    check_error(ask(server), 503, "no memory left for this request")
    assert call(server, "GET", "/health").status_code == 200


def test_a_server_that_stops_lets_no_one_wait(start):
    model = Paced()
    server = start(model, max_num_seqs=1)

    async def stop():
        async with client_of(server.app()) as client:
            both = [post(client), post(client)]
            await until(lambda: server.admission.num_open == 2)
            await until(lambda: model.entered.acquire(blocking=False))
            num_new = server.thread._new.qsize()
            stopping = asyncio.create_task(asyncio.to_thread(server.thread.stop))
            await until(lambda: server.thread._new.qsize() > num_new)
            model.may_run.release()
            await stopping
            return await asyncio.gather(*both)

    first, second = asyncio.run(stop())
    assert first.status_code == 200
    check_error(second, 503, "the server is shutting down")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speculative": "ngram"}, "speculative is 'ngram', which servers of models of time"),
        ({"lora": "a=b"}, "lora is"),
        ({"max_model_len": 9}, "max-model-len is 9"),
        ({"record_routes": "folder"}, "record-routes is 'folder'"),
    ],
)
def test_arguments_of_text_are_refused(start, options, message):
    with pytest.raises(ConfigError, match=message):
        start(Seasonal(), **options)


def test_the_page_names_all_flags_that_are_refused():
    page = (Path(moeyard.__file__).parent / "docs" / "serving.md").read_text()
    section = page.split("\n## Forecasts\n")[1].split("\n## ")[0]
    for name in OF_TEXT:
        assert f"`--{name.replace('_', '-')}`" in section


def test_random_walks_come_back_as_numbers_of_json(server):
    series = np.random.default_rng(0).normal(size=(3, 30)).cumsum(axis=1).tolist()
    answer = ask(server, series=series, horizon=PERIOD).json()
    means = [one["mean"] for one in answer["data"]]
    np.testing.assert_allclose(means, np.array(series)[:, -PERIOD:], rtol=1e-6)
