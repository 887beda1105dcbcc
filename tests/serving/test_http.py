"""The HTTP application as clients see it, without Ray."""

import asyncio
import json
import os
import threading

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from moeyard.serving.experts.tiers import disk
from moeyard.serving.serve_args import ServeArgs
from moeyard.serving.server import Server

from http_calls import KEY, call, check_error, client_of, events

BODY = {"model": "small", "prompt": "ab", "max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def server(model_folder):
    running = Server(ServeArgs(model=str(model_folder), expert_memory="25%", api_key="secret"))
    yield running
    running.close()


def complete(server, **changes) -> httpx.Response:
    return call(server, "POST", "/v1/completions", json={**BODY, **changes})


def test_answers_with_openais_object(server):
    answer = complete(server).json()
    assert answer["object"] == "text_completion" and answer["model"] == "small"
    (choice,) = answer["choices"]
    assert choice["index"] == 0 and choice["finish_reason"] == "length" and choice["text"]
    assert answer["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 8,
        "total_tokens": 10,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_a_stream_joins_to_the_plain_answer_and_ends_with_done(server):
    plain = complete(server).json()
    streamed = complete(server, stream=True, stream_options={"include_usage": True})
    assert streamed.headers["content-type"].startswith("text/event-stream")
    *chunks, usage, done = events(streamed)
    assert done == "[DONE]"
    choices = [json.loads(chunk)["choices"][0] for chunk in chunks]
    assert "".join(c["text"] for c in choices) == plain["choices"][0]["text"]
    assert [c["finish_reason"] for c in choices[:-1]] == [None] * (len(choices) - 1)
    assert choices[-1]["finish_reason"] == "length"
    assert json.loads(usage)["usage"] == plain["usage"] and json.loads(usage)["choices"] == []


def test_several_prompts_and_answers_come_back_in_order(server):
    answer = complete(server, prompt=["ab", "ab", "zz"], n=2, max_tokens=4).json()
    texts = [choice["text"] for choice in answer["choices"]]
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    assert len(set(texts[:4])) == 1 and texts[4] == texts[5] != texts[0]
    assert answer["usage"] == {
        "prompt_tokens": 6,
        "completion_tokens": 24,
        "total_tokens": 30,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_seeds_differ_between_answers_and_repeat_between_requests(server):
    def ask():
        answer = complete(server, temperature=1.0, seed=5, n=3, max_tokens=12).json()
        return [choice["text"] for choice in answer["choices"]]

    assert ask() == ask() and len(set(ask())) == 3


def test_routed_rows_are_tokens_times_choices_in_what_prometheus_reads(server):
    complete(server, prompt="some longer prompt", max_tokens=5)
    response = call(server, "GET", "/metrics")
    families = list(text_string_to_metric_families(response.text))
    samples = [sample for family in families for sample in family.samples]

    def total(name):
        found = [s.value for s in samples if s.name == name]
        assert found, name
        return sum(found)

    layers = {s.labels["layer"] for s in samples if s.name == "moeyard_expert_tokens_total"}
    assert layers == {"0", "2"}
    tokens = total("moeyard_moe_tokens_total")
    assert total("moeyard_expert_tokens_total") == tokens * 2 * len(layers) > 0
    assert total("moeyard_expert_cache_misses_total") > 0
    assert total("moeyard_expert_bytes_read_total") % total("moeyard_expert_slot_bytes") == 0
    assert total("moeyard_experts_resident") <= total("moeyard_expert_slots") == 3
    assert total("moeyard_generation_tokens_total") > 0
    assert total("moeyard_time_to_first_token_seconds_count") > 0
    assert all(family.documentation for family in families)


BAD_BODIES = {
    "not_json": (b"{", "the body is not JSON"),
    "a_list": (b"[]", "the body is a list"),
    "nan": (b'{"model":"small","prompt":"a","temperature":NaN}', "holds NaN"),
    "infinity": (b'{"model":"small","prompt":"a","top_p":-Infinity}', "holds -Infinity"),
    "overflow": (b'{"model":"small","prompt":"a","temperature":1e999}', "temperature is inf"),
    "deep": (b"[" * 200_000, "nested too deeply"),
    "huge_integer": (b'{"model":"small","prompt":"a","seed":' + b"9" * 5000 + b"}", "not JSON"),
    "bad_utf8": (b'{"model":"\xff"}', "not JSON"),
    "surrogate": (b'{"model":"small","prompt":"\\ud800"}', "half of a surrogate pair"),
    "no_prompt": (b'{"model":"small"}', "prompt is missing"),
    "surrogate_key": (b'{"model":"small","prompt":"a","\\ud800":1}', "not valid Unicode"),
    "newline_key": (b'{"model":"small","prompt":"a","x\\ny":1}', "x\\ny is not a known"),
    "no_model": (b'{"prompt":"a"}', "model is missing"),
    "empty": (b"", "not JSON"),
}


@pytest.mark.parametrize("case", BAD_BODIES)
def test_a_malformed_body_gets_400_and_one_sentence(server, case):
    body, message = BAD_BODIES[case]
    check_error(call(server, "POST", "/v1/completions", content=body), 400, message)


BAD_VALUES = {
    "misspelt": ({"max_token": 3}, "max_token is not a known parameter; did you mean max_tokens"),
    "unknown": ({"zzz": 3}, "zzz is not a known parameter; leave it out"),
    "unsupported": ({"suffix": "x"}, "suffix is not supported"),
    "hot": ({"temperature": 9}, "temperature is 9, but it should be less than or equal to 2"),
    "no_tokens": ({"max_tokens": 0}, "max_tokens is 0, which needs echo"),
    "late_least": ({"min_tokens": 9}, "min_tokens is 9, but the answer ends after 8"),
    "stop_id": ({"stop_token_ids": [257]}, "stop_token_ids holds 257"),
    "stop_ids": ({"stop_token_ids": ["a"]}, "stop_token_ids is ['a']"),
    "all_stop": ({"stop_token_ids": list(range(256)), "min_tokens": 1}, "leaves none to choose"),
    "fraction": ({"max_tokens": 1.5}, "max_tokens is 1.5"),
    "text_number": ({"max_tokens": "8"}, "max_tokens is '8'"),
    "top_p": ({"top_p": 0}, "top_p is 0"),
    "many": ({"n": 9}, "n is 9"),
    "mixed_prompt": ({"prompt": ["a", 3]}, "prompt must be a string"),
    "bool_ids": ({"prompt": [True, False]}, "prompt must be a string"),
    "object_prompt": ({"prompt": {"a": 1}}, "prompt must be a string"),
    "no_prompts": ({"prompt": []}, "empty list"),
    "empty_prompt": ({"prompt": ""}, "prompt is empty"),
    "id_above": ({"prompt": [257]}, "token id 257"),
    "id_below": ({"prompt": [-1]}, "token id -1"),
    "id_huge": ({"prompt": [2**63]}, "token id 9223372036854775808"),
    "too_long": ({"prompt": "x" * 300}, "context length is 256 tokens"),
    "too_many_tokens": ({"max_tokens": 255}, "context length is 256 tokens"),
    "echo": ({"echo": "yes"}, "echo is 'yes'"),
    "logprobs_bool": ({"logprobs": True}, "logprobs is True"),
    "logprobs_many": ({"logprobs": 21}, "logprobs is 21"),
    "best_of": ({"best_of": True}, "best_of is not supported"),
    "text_temperature": ({"temperature": "0.5"}, "temperature is '0.5'"),
    "late_mixed_ids": ({"prompt": [1] * 200_000 + ["a"]}, "prompt must be a string"),
    "long_stop": ({"stop": "x" * 257}, "of 1 to 256 characters"),
    "stream_option": (
        {"stream": True, "stream_options": {"include_usag": True}},
        "stream_options.include_usag is not a known parameter; did you mean include_usage",
    ),
    "stops": ({"stop": ["a"] * 5}, "up to 4 strings"),
    "empty_stop": ({"stop": ""}, "of 1 to 256 characters"),
    "penalty": ({"presence_penalty": 1}, "presence_penalty is not supported"),
    "seed": ({"seed": 2**63}, "seed is 9223372036854775808"),
    "usage": ({"stream_options": {"include_usage": True}}, "needs stream = true"),
}


@pytest.mark.parametrize("case", BAD_VALUES)
def test_a_bad_value_gets_400_naming_the_field(server, case):
    changes, message = BAD_VALUES[case]
    error = check_error(complete(server, **changes), 400, message)
    if case in ("too_long", "too_many_tokens"):
        assert error["code"] == "context_length_exceeded"
    assert error["param"] is not None


def test_null_means_default_and_the_server_goes_on(server):
    assert complete(server, seed=None, stop=None, logprobs=None, user="me").status_code == 200


def test_an_unknown_model_is_404(server):
    error = check_error(complete(server, model="gpt-9"), 404, "model 'gpt-9' does not exist")
    assert error["code"] == "model_not_found"
    check_error(call(server, "GET", "/v1/models/gpt-9"), 404, "does not exist")
    assert call(server, "GET", "/v1/models/small").json()["id"] == "small"


def test_a_large_body_is_413(server):
    check_error(complete(server, prompt="x" * (1 << 20)), 413, "larger than 1048576 bytes")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("GET", "/", 404),
        ("GET", "/v1/completions", 405),
        ("POST", "/v1/forecast", 404),
    ],
)
def test_other_routes_answer_in_openais_shape(server, method, path, status):
    check_error(call(server, method, path), status, "is not offered")


PATHS = ["/v1/models", "/v1/completions", "/metrics", "/", "/v1/models/small", "//v1/models"]
PATHS += ["/v1/../metrics", "/v1/models/", "/docs", "/openapi.json", "/health/../metrics"]


@pytest.mark.parametrize("method", ["GET", "POST", "HEAD", "OPTIONS"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "bearer secret"},
        {"Authorization": "Bearer SECRET"},
        {"Authorization": "secret"},
        {"Authorization": "Bearer secret "},
    ],
    ids=["none", "wrong", "scheme_case", "key_case", "no_scheme", "trailing_space"],
)
def test_nothing_but_health_answers_without_the_key(server, method, path, headers):
    response = call(server, method, path, headers=headers)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    if method != "HEAD":
        assert response.json()["error"]["code"] == "invalid_api_key"


def test_health_is_open_and_means_it(server, model_folder):
    assert call(server, "GET", "/health", headers={}).json() == {"status": "ok"}
    broken = Server(ServeArgs(model=str(model_folder)))
    broken.thread.engine.step = lambda: 1 / 0
    check_error(complete(broken), 503, "the engine failed (ZeroDivisionError)")
    response = call(broken, "GET", "/health")
    assert response.status_code == 503 and "ZeroDivisionError" in response.json()["reason"]
    check_error(complete(broken), 503, "the engine failed")


def test_health_tells_of_an_engine_stuck_in_one_step_until_it_goes_on(model_folder):
    server = Server(ServeArgs(model=str(model_folder)))
    server.thread._stuck_after_s = 0.0
    assert call(server, "GET", "/health").status_code == 200, "an idle engine is not stuck"
    step, entered, may_run = server.thread.engine.step, threading.Event(), threading.Event()

    def stuck():
        entered.set()
        assert may_run.wait(30)
        return step()

    async def ask():
        async with client_of(server.app()) as client:
            # The first request is under way when the engine gets stuck.
            server.thread._stuck_after_s = 1e9
            first = asyncio.create_task(client.post("/v1/completions", json=BODY))
            await asyncio.to_thread(entered.wait)
            server.thread._stuck_after_s = 0.0
            health = await client.get("/health")
            refused = await client.post("/v1/completions", json=BODY)
            server.thread._stuck_after_s = 1e9
            may_run.set()
            return health, refused, await first, await client.get("/health")

    server.thread.engine.step = stuck
    health, refused, first, after = asyncio.run(ask())
    assert health.status_code == 503 and "in one step for" in health.json()["reason"]
    check_error(refused, 503, "in one step for")
    assert first.status_code == after.status_code == 200
    server.close()


@pytest.mark.usefixtures("reads_by_preadv")
def test_an_unreadable_expert_gives_503_or_an_error_event_and_the_server_goes_on(
    model_folder, monkeypatch
):
    monkeypatch.setattr(disk, "RETRY_PAUSE_S", 0)
    server = Server(ServeArgs(model=str(model_folder), expert_memory="25%"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", lambda *_: 0)
        refused = complete(server)
        check_error(refused, 503, "could not be read")
        assert int(refused.headers["retry-after"]) > 0
        error, done = events(complete(server, stream=True))
        assert "could not be read" in json.loads(error)["error"]["message"] and done == "[DONE]"
    assert complete(server).status_code == 200
    server.close()


def test_a_client_that_leaves_frees_its_place(server):
    async def leave():
        transport = httpx.ASGITransport(app=server.app())
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            body = {**BODY, "max_tokens": 250}
            task = asyncio.create_task(client.post("/v1/completions", json=body, headers=KEY))
            while not server.thread.engine.has_work:
                await asyncio.sleep(0.001)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            for _ in range(500):
                if not server.thread.engine.has_work:
                    return True
                await asyncio.sleep(0.01)
            return False

    before = call(server, "GET", "/metrics").text
    assert asyncio.run(leave())
    after = call(server, "GET", "/metrics").text

    def cancelled(text):
        name = "moeyard_requests_cancelled_total"
        return next(float(line.split()[1]) for line in text.splitlines() if line.startswith(name))

    assert cancelled(after) == cancelled(before) + 1


def test_extreme_sampling_values_are_served(server):
    for options in ({"temperature": 1e-40}, {"top_p": 1e-50}, {"temperature": 1e-9, "top_p": 1e-9}):
        answer = complete(server, **{"temperature": 1.0, **options})
        assert answer.status_code == 200, answer.text
        if "temperature" in options:  # as good as greedy
            assert answer.json()["choices"] == complete(server).json()["choices"]
    options = {"stream": True, "stream_options": {"include_obfuscation": False}}
    assert complete(server, **options).status_code == 200


def test_requests_that_arrive_while_the_engine_dies_are_answered(model_folder):
    server = Server(ServeArgs(model=str(model_folder)))
    arrived = threading.Event()

    def die():
        arrived.wait(10)
        raise SystemExit("a native library gave up")

    server.thread.engine.step = die

    async def ask():
        transport = httpx.ASGITransport(app=server.app())
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            posts = [client.post("/v1/completions", json=BODY) for _ in range(5)]
            tasks = [asyncio.create_task(post) for post in posts]
            await asyncio.sleep(0.3)
            arrived.set()
            return await asyncio.wait_for(asyncio.gather(*tasks), 10)

    for answer in asyncio.run(ask()):
        check_error(answer, 503, "the engine failed (SystemExit)")
        assert int(answer.headers["retry-after"]) > 0
    check_error(complete(server), 503, "the engine failed (SystemExit)")


def test_an_open_server_asks_for_no_key(model_folder):
    server = Server(ServeArgs(model=str(model_folder)))
    assert call(server, "GET", "/v1/models", headers={}).status_code == 200
    server.close()
