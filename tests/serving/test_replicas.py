"""Two replicas behind ``moeyard serve``: one API, one set of metrics, an orderly end."""

import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

from moeyard.serving.cluster.guardian import IDLE_WORKER

from server_process import BIN, Running, free_port, name_of
from small_model import CONFIG, write_random_model

pytestmark = pytest.mark.server
PROMPT = "hello 1"
"""One that the model answers at length."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that can talk for long."""
    path = tmp_path_factory.mktemp("model") / "long"
    write_random_model(path, CONFIG.model_copy(update={"max_positions": 8192}))
    return path


def start(folder, log_folder, *options):
    template = log_folder / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    port = free_port()
    command = [str(BIN / "moeyard"), "serve", str(folder), "--port", str(port)]
    command += ["--num-threads", "1", "--chat-template", str(template), *options]
    return Running(command, log_folder / "log.txt", port)


@pytest.fixture(scope="module")
def server(tmp_path_factory, folder):
    options = ["--replicas", "2", "--max-num-seqs", "4", "--max-queued-requests", "1"]
    options += ["--drain-timeout", "90"]
    running = start(folder, tmp_path_factory.mktemp("server"), *options)
    try:
        running.wait_until_ready()
        yield running
    finally:
        running.end()


def client_of(server, retries=0):
    return openai.OpenAI(base_url=f"{server.base}/v1", api_key="none", max_retries=retries)


def stream(server, max_tokens=4000, events=None):
    """Stream a long completion; return its events, which also go to ``events`` as they come."""
    events = [] if events is None else events
    body = {"model": "long", "prompt": PROMPT, "max_tokens": max_tokens, "temperature": 0}
    with httpx.stream(
        "POST", f"{server.base}/v1/completions", json={**body, "stream": True}, timeout=120
    ) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if line:
                events.append(line.removeprefix("data: "))
    return events


def ends_well(events):
    last = json.loads(events[-2])
    return events[-1] == "[DONE]" and "error" not in last and last["choices"][0]["finish_reason"]


def ends_with_error(events, message):
    return events[-1] == "[DONE]" and message in json.loads(events[-2])["error"]["message"]


def test_the_openai_client_chats(server):
    client = client_of(server)
    options = {"model": "long", "messages": [{"role": "user", "content": "hi"}], "temperature": 0}
    options |= {"max_tokens": 12, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**options)
    (choice,) = whole.choices
    assert choice.message.role == "assistant" and choice.finish_reason == "length"
    assert len(choice.logprobs.content) == 12 == whole.usage.completion_tokens
    assert all(len(token.top_logprobs) == 2 for token in choice.logprobs.content)
    pieces = list(
        client.chat.completions.create(
            **options, stream=True, stream_options={"include_usage": True}
        )
    )
    assert pieces[0].choices[0].delta.role == "assistant"
    parts = [piece.choices[0] for piece in pieces[:-1]]
    assert "".join(part.delta.content or "" for part in parts) == choice.message.content
    scores = [token for part in parts if part.logprobs for token in part.logprobs.content]
    assert scores == choice.logprobs.content
    assert pieces[-1].usage.total_tokens == whole.usage.total_tokens
    plain = client.completions.create(
        model="long", prompt="hi", max_tokens=12, temperature=0, logprobs=2
    )
    assert plain.choices[0].logprobs.tokens == [token.token for token in choice.logprobs.content]


def test_too_many_get_429_and_the_openai_client_comes_back(server):
    def ask(retries):
        client = client_of(server, retries)
        try:
            answer = client.completions.create(
                model="long", prompt=PROMPT, max_tokens=2000, temperature=0
            )
            return answer.choices[0].text
        except openai.RateLimitError as error:
            assert error.code == "rate_limit_exceeded"
            assert int(error.response.headers["retry-after"]) >= 1
            assert "as many answers as it takes" in error.message, "a replica had to refuse"
            return None

    before = server.totals()
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, [0] * 16))
        refused = answers.count(None)
        assert 0 < refused < 16
        patient = list(pool.map(ask, [30] * 8))
    assert len({*answers, *patient} - {None}) == 1 and None not in patient
    deadline = time.monotonic() + 30
    name = "moeyard_requests_rejected_total"
    while server.totals()[name] - before.get(name, 0) < refused:
        assert time.monotonic() < deadline, "refusals are not counted"
        time.sleep(0.2)


def test_metrics_are_sums_over_both_replicas(server):
    # Streams that other tests left are still being cancelled; replicas report once a second.
    name, before = "moeyard_generation_tokens_total", None
    while (settled := server.totals()[name]) != before:
        before = settled
        time.sleep(3)

    def ask(number):
        client = client_of(server, 30)
        answer = client.completions.create(
            model="long", prompt=f"request {number}", max_tokens=10, temperature=0
        )
        return answer.usage.completion_tokens

    with ThreadPoolExecutor(6) as pool:
        tokens = sum(pool.map(ask, range(30)))
    deadline = time.monotonic() + 30
    while server.totals()[name] < before + tokens:
        assert time.monotonic() < deadline, (server.totals()[name], before, tokens)
        time.sleep(0.2)
    assert server.totals()[name] == before + tokens
    totals = server.totals()
    assert totals["moeyard_expert_tokens_total"] == totals["moeyard_moe_tokens_total"] * 2 * 2


def test_a_killed_replica_ends_its_streams_with_an_error_and_its_counts_stay(server):
    seen = [[] for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        # One after the other, so that Ray sees where the fewest are and uses both replicas.
        tasks = []
        for events in seen:
            tasks.append(pool.submit(stream, server, 8000, events))
            while len(events) < 10:
                assert not any(task.done() for task in tasks), [task.exception() for task in tasks]
                time.sleep(0.05)
        before = server.totals()
        os.kill(server.replicas()[0], signal.SIGKILL)
        broken = [events for events in (task.result() for task in tasks) if not ends_well(events)]
    assert 0 < len(broken) < 4
    assert all(ends_with_error(events, "lost the process") for events in broken)
    assert client_of(server, 1).completions.create(model="long", prompt="a", max_tokens=2).choices
    after = server.totals()
    counts = [name for name in before if name.endswith(("_total", "_count", "_bucket"))]
    assert len(counts) > 10
    assert [name for name in counts if after[name] < before[name]] == []


def spares(server):
    """Return the idle processes that have imported what a replica needs."""
    maps = {int(pid): Path(f"/proc/{pid}/maps") for pid in server.members()}
    idle = [pid for pid in maps if name_of(pid) == IDLE_WORKER]
    return [pid for pid in idle if "libtorch_cpu" in maps[pid].read_text()]


def test_a_killed_replica_is_replaced_in_the_spare_process(server):
    deadline = time.monotonic() + 60
    while len(server.replicas()) < 2 or not (spare := spares(server)):
        assert time.monotonic() < deadline, "there is no spare"
        time.sleep(0.2)
    before = server.replicas()
    os.kill(before[0], signal.SIGKILL)
    while spare[0] not in server.replicas():
        assert time.monotonic() < deadline, (spare, server.replicas())
        time.sleep(0.1)
    assert set(server.replicas()) - set(before) == {spare[0]}


def test_sigterm_lets_streams_finish_and_nobody_in(server):
    while len(server.replicas()) < 2:
        time.sleep(0.2)
    seen = [[] for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        tasks = [pool.submit(stream, server, 2500, events) for events in seen]
        while min(map(len, seen)) < 20:
            assert not any(task.done() for task in tasks), [task.exception() for task in tasks]
            time.sleep(0.05)
        server.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 30
        while (health := httpx.get(f"{server.base}/health", timeout=30)).status_code == 200:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert health.json() == {"status": "draining", "reason": "the server is shutting down"}
        with pytest.raises(openai.InternalServerError, match="shutting down") as caught:
            client_of(server).completions.create(model="long", prompt="a")
        assert caught.value.status_code == 503 and caught.value.response.headers["retry-after"]
        assert all(ends_well(task.result()) for task in tasks)
    assert server.process.wait(60) == 0, server.log()
    assert "Traceback" not in server.log()


@pytest.mark.slow
@pytest.mark.parametrize("signals", [1, 2], ids=["timeout", "second_signal"])
def test_what_does_not_finish_in_time_is_ended(tmp_path, folder, signals):
    timeout = "1" if signals == 1 else "60"
    server = start(folder, tmp_path, "--drain-timeout", timeout)
    try:
        server.wait_until_ready()
        events: list[str] = []
        failures: list[Exception] = []

        def watch():
            try:
                stream(server, 8000, events)
            except httpx.HTTPError as error:
                failures.append(error)

        thread = threading.Thread(target=watch)
        thread.start()
        while len(events) < 20:
            time.sleep(0.05)
        server.process.send_signal(signal.SIGTERM)
        if signals == 2:
            time.sleep(1)
            server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == (0 if signals == 1 else 130), server.log()
        thread.join(30)
        if signals == 1:
            assert not failures and ends_with_error(events, "shutting down")
        else:
            assert failures, "the connection breaks when everything ends immediately"
        assert "Traceback" not in server.log()
    finally:
        server.end()
