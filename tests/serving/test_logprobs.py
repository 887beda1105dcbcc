"""Reported log-probabilities are the model's own, whatever the sampling."""

import math

import pytest
import torch

from moeyard.moe.models.sampling import SamplingParams
from moeyard.serving.api.chat import ChatRequest, ChatWording
from moeyard.serving.api.completions import CompletionRequest, CompletionWording, TextOffsets
from moeyard.serving.api.outlets import Answer
from moeyard.serving.engine.engine import Engine
from moeyard.serving.engine.logprobs import LOWEST, TokenLogprob, score_tokens
from moeyard.serving.engine.tokenizer import ServingTokenizer
from moeyard.serving.loading import open_model
from moeyard.serving.serve_args import ServeArgs
from moeyard.serving.server import Server

from http_calls import call, chunks
from test_engine import latin, prompts, request


@pytest.fixture(scope="module")
def server(model_folder):
    running = Server(ServeArgs(model=str(model_folder)))
    yield running
    running.close()


def complete(server, **changes):
    body = {"model": "small", "prompt": "some prompt", "max_tokens": 8, "temperature": 0}
    answer = call(server, "POST", "/v1/completions", json={**body, **changes})
    assert answer.status_code == 200, answer.text
    return answer


def scores_of(engine, *requests):
    """Run requests and return each one's reported log-probabilities."""
    for one in requests:
        engine.add(one)
    found = {one.request_id: [] for one in requests}
    while engine.has_work:
        for event in engine.step():
            found[event.request_id] += event.logprobs
    return found


@pytest.mark.parametrize("chunk", [5, 256])
@pytest.mark.parametrize("memory", [None, "25%"], ids=["resident", "offloaded"])
def test_they_are_log_softmax_of_the_models_scores_before_temperature(model_folder, chunk, memory):
    model, store = open_model(model_folder, expert_memory=memory)
    hot = SamplingParams(temperature=1.7, top_p=0.9, top_k=40)
    asked = [
        request(str(i), prompt, sampling=hot, seed=i, num_logprobs=4, scores_prompt=True)
        for i, prompt in enumerate(prompts(4))
    ]
    engine = Engine(model, latin, store, max_num_seqs=3, prefill_chunk=chunk)
    for one, found in zip(asked, scores_of(engine, *asked).values(), strict=True):
        ids = [score.token for score in found]
        assert tuple(ids[: len(one.prompt_ids)]) == one.prompt_ids
        assert found[0].logprob is None and found[0].top == ()
        expected_TV = model(torch.tensor([ids]))[0].double().log_softmax(dim=-1)
        for position, score in enumerate(found[1:]):
            row_V = expected_TV[position]
            assert score.logprob == pytest.approx(float(row_V[score.token]), abs=2e-4)
            top = row_V.topk(4)
            assert [value for _, value in score.top] == pytest.approx(top.values.tolist(), abs=2e-4)
            assert [row_V[token].item() for token, _ in score.top] == pytest.approx(
                top.values.tolist(), abs=2e-4
            )


def test_only_requests_that_ask_pay_for_them(model_folder, monkeypatch):
    from moeyard.serving.engine import choosing

    model, store = open_model(model_folder)
    calls = []
    real = choosing.score_tokens
    monkeypatch.setattr(
        choosing, "score_tokens", lambda *given: calls.append(given) or real(*given)
    )
    engine = Engine(model, latin, store)
    found = scores_of(engine, request("a", [1, 2]), request("b", [3], num_logprobs=0, max_tokens=5))
    assert found["a"] == [] and len(found["b"]) == 5 == len(calls)


def test_asking_changes_no_token(server):
    for options in ({}, {"temperature": 1.0, "seed": 4}, {"echo": True}):
        plain, asked = complete(server, **options), complete(server, **options, logprobs=3)
        assert plain.json()["choices"][0]["text"] == asked.json()["choices"][0]["text"]


def test_completions_get_the_legacy_object(server):
    choice = complete(server, logprobs=2).json()["choices"][0]
    logprobs = choice["logprobs"]
    assert set(logprobs) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    assert {len(values) for values in logprobs.values()} == {8}
    for name, value, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert top[name] == value == max(top.values()) < 0  # greedy takes the likeliest
        assert len(top) == 2
    none = complete(server, logprobs=0, temperature=2.0, seed=1).json()["choices"][0]["logprobs"]
    assert [list(top) for top in none["top_logprobs"]] == [[name] for name in none["tokens"]]


def test_a_token_outside_the_likeliest_is_listed_all_the_same(server):
    logprobs = complete(server, logprobs=1, temperature=2.0, seed=1, max_tokens=40).json()
    logprobs = logprobs["choices"][0]["logprobs"]
    sizes = {len(top) for top in logprobs["top_logprobs"]}
    assert sizes == {1, 2}
    for name, value, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert top[name] == value


@pytest.mark.parametrize("prompt", ["some prompt", list(b"some prompt")], ids=["text", "ids"])
def test_echo_puts_the_prompt_and_its_scores_in_front(server, prompt):
    plain = complete(server, prompt=prompt, logprobs=1).json()["choices"][0]
    echoed = complete(server, prompt=prompt, logprobs=1, echo=True).json()
    choice = echoed["choices"][0]
    assert choice["text"] == "some prompt" + plain["text"]
    assert echoed["usage"]["completion_tokens"] == 8
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"][:11]) == "some prompt"
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    assert all(value < 0 for value in logprobs["token_logprobs"][1:])
    assert logprobs["tokens"][11:] == plain["logprobs"]["tokens"]
    assert logprobs["token_logprobs"][11:] == plain["logprobs"]["token_logprobs"]
    assert logprobs["text_offset"][:12] == list(range(12))  # this tokenizer's ids are bytes
    assert logprobs["text_offset"] == sorted(logprobs["text_offset"])


@pytest.mark.parametrize("echo", [False, True], ids=["plain", "echo"])
def test_streamed_scores_join_to_the_plain_ones(server, echo):
    options = {"logprobs": 2, "prompt": ["ab", "cde"], "n": 2, "echo": echo, "seed": 1}
    plain = complete(server, **options).json()["choices"]
    streamed = chunks(complete(server, **options, stream=True))
    for choice in plain:
        pieces = [p["choices"][0] for p in streamed if p["choices"][0]["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in pieces) == choice["text"]
        for name, values in choice["logprobs"].items():
            assert [v for piece in pieces for v in piece["logprobs"][name]] == values


def test_chat_gets_tokens_with_their_bytes(server, model_folder, tmp_path):
    file = tmp_path / "template.jinja"
    file.write_text("{{ messages[0].content }}")
    chatty = Server(ServeArgs(model=str(model_folder), chat_template=str(file)))
    body = {"model": "small", "messages": [{"role": "user", "content": "some prompt"}]}
    body |= {"max_tokens": 8, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    whole = call(chatty, "POST", "/v1/chat/completions", json=body).json()["choices"][0]
    content = whole["logprobs"]["content"]
    legacy = complete(server, logprobs=2).json()["choices"][0]["logprobs"]
    assert [token["token"] for token in content] == legacy["tokens"]
    assert [token["logprob"] for token in content] == legacy["token_logprobs"]
    for token, top in zip(content, legacy["top_logprobs"], strict=True):
        assert {t["token"]: t["logprob"] for t in token["top_logprobs"]} == top
    spelled = bytes(byte for token in content for byte in token["bytes"])
    assert spelled.decode(errors="replace") == whole["message"]["content"]
    streamed = chunks(call(chatty, "POST", "/v1/chat/completions", json={**body, "stream": True}))
    parts = [p["choices"][0]["logprobs"] for p in streamed]
    assert [token for part in parts if part for token in part["content"]] == content
    chatty.close()


def test_what_cannot_be_drawn_has_a_finite_score():
    row = torch.tensor([[0.0, 3e38, -3e38]])
    (score,) = score_tokens(row, [2], 3)
    assert score.logprob == LOWEST and score.top[0] == (1, 0.0)
    (score,) = score_tokens(torch.tensor([[math.nan, 0.0]]), [0], 0)
    assert score.logprob == LOWEST


def test_offsets_count_characters_and_not_bytes():
    offsets = TextOffsets()
    pieces = [b"na", b"\xc3", b"\xaf", b"v\xe6", b"\x97\xa5", b"!"]
    assert [offsets.next(piece) for piece in pieces] == [0, 2, 2, 3, 4, 5]


def test_names_of_tokens_differ_and_bytes_join_to_the_text(model_folder):
    tokenizer = ServingTokenizer(model_folder)
    names = [tokenizer.token_name(token) for token in range(257)]
    assert len(set(names)) == 257
    assert names[ord("a")] == "a" and names[0xE2] == "bytes:\\xe2"
    assert names[256] == "<|endoftext|>" and tokenizer.token_name(999) == "token_id:999"
    text = "na\u00efve \u65e5\u672c \u2192 ok"
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))).decode() == text


class Ambiguous:
    """A letter and its byte have the same text, as in SentencePiece's vocabularies."""

    NAMES = {0: "a", 1: "a", 2: "b", 3: "a"}

    def token_name(self, token):
        return self.NAMES[token]

    def token_bytes(self, token):
        return self.NAMES[token].encode()


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        (0, {"a": -1.0, "token_id:1": -2.0, "b": -3.0}),
        (1, {"token_id:0": -1.0, "a": -2.0, "b": -3.0}),
        (2, {"a": -1.0, "token_id:1": -2.0, "b": -3.0}),
        (3, {"token_id:0": -1.0, "token_id:1": -2.0, "b": -3.0, "a": -4.0}),
    ],
)
def test_ids_with_one_text_all_keep_their_log_probability(own, expected):
    top = ((0, -1.0), (1, -2.0), (2, -3.0))
    answer = Answer(logprobs=[TokenLogprob(own, -1.0 - own, top)])
    body = CompletionRequest(model="m", prompt="p", logprobs=3)
    found = CompletionWording(body, Ambiguous()).whole(0, answer)["logprobs"]
    assert found["top_logprobs"] == [expected] and list(found["top_logprobs"][0]) == list(expected)
    assert found["top_logprobs"][0][found["tokens"][0]] == found["token_logprobs"][0]
    chat = ChatRequest(model="m", messages=[], logprobs=True, top_logprobs=3)
    listed = ChatWording(chat, Ambiguous()).whole(0, answer)["logprobs"]["content"][0]
    assert [one["logprob"] for one in listed["top_logprobs"]] == [-1.0, -2.0, -3.0]
