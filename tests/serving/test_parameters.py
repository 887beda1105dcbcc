"""Parameters that vLLM's clients send, and fields that change nothing, by the values they give."""

import pytest

from moeyard.serving.serve_args import ServeArgs
from moeyard.serving.server import Server

from http_calls import call, check_error, chunks

BODY = {"model": "small", "prompt": "ab", "max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def server(model_folder):
    running = Server(ServeArgs(model=str(model_folder), served_model_name="small"))
    yield running
    running.close()


def complete(server, **changes):
    return call(server, "POST", "/v1/completions", json={**BODY, **changes})


def ids_of(server, **changes):
    """Return the names of an answer's tokens, and its choice."""
    answer = complete(server, logprobs=0, **changes).json()
    return answer["choices"][0]["logprobs"]["tokens"], answer["choices"][0]


def first_id(server):
    """Return the id that the model says first; an id of these models is a byte."""
    name = ids_of(server)[0][0]
    return ord(name) if len(name) == 1 else int(name.removeprefix("bytes:\\x"), 16)


def test_a_stop_token_ends_the_answer_and_is_named(server):
    first = first_id(server)
    choice = complete(server, stop_token_ids=[first]).json()["choices"][0]
    assert choice["finish_reason"] == "stop" and choice["stop_reason"] == first
    assert choice["text"] == ""
    assert "stop_reason" not in complete(server).json()["choices"][0]


def test_min_tokens_forbids_stop_tokens_until_then(server):
    first = first_id(server)
    names, _ = ids_of(server, stop_token_ids=[first], min_tokens=8)
    free, _ = ids_of(server)
    assert len(names) == 8 and free[0] not in names
    usage = complete(server, stop_token_ids=[first], min_tokens=3).json()["usage"]
    assert 3 <= usage["completion_tokens"] <= 8


def test_min_tokens_holds_stop_strings_off_until_then(server):
    text = complete(server).json()["choices"][0]["text"]
    stop = text[0]
    assert complete(server, stop=stop).json()["choices"][0]["text"] == ""
    whole = complete(server, stop=stop, min_tokens=8).json()["choices"][0]
    assert (whole["text"], whole["finish_reason"]) == (text, "length")


@pytest.fixture(scope="module")
def ending_prompt(server):
    """Return options with which an answer ends at the end of the text."""
    for seed in range(200):
        options = {"temperature": 2.0, "seed": seed, "max_tokens": 60}
        if complete(server, **options).json()["choices"][0]["finish_reason"] == "stop":
            return options
    pytest.fail("no answer ends")


def test_ignore_eos_goes_on_and_says_the_same_before(server, ending_prompt):
    short = complete(server, **ending_prompt).json()
    long = complete(server, ignore_eos=True, **ending_prompt).json()
    assert short["usage"]["completion_tokens"] < long["usage"]["completion_tokens"] == 60
    assert long["choices"][0]["finish_reason"] == "length"
    assert long["choices"][0]["text"].startswith(short["choices"][0]["text"])


def test_min_tokens_forbids_the_end_of_the_text(server, ending_prompt):
    answer = complete(server, min_tokens=60, **ending_prompt).json()
    assert answer["usage"]["completion_tokens"] == 60


def test_continuous_usage_counts_every_event(server):
    asked = {"include_usage": True, "continuous_usage_stats": True}
    *pieces, last = chunks(complete(server, stream=True, logprobs=0, stream_options=asked))
    assert [piece["usage"]["completion_tokens"] for piece in pieces] == list(range(1, 9))
    assert all(piece["usage"]["prompt_tokens"] == 2 for piece in pieces)
    assert last["choices"] == [] and last["usage"] == pieces[-1]["usage"]
    for one in asked:
        found = chunks(complete(server, stream=True, stream_options={one: True}))
        assert not any("usage" in piece for piece in found if piece["choices"])


def test_a_prompt_is_scored_without_an_answer(server):
    scored = complete(server, prompt="abcd", max_tokens=0, echo=True, logprobs=1).json()
    longer = complete(server, prompt="abcd", max_tokens=1, echo=True, logprobs=1).json()
    choice, other = scored["choices"][0], longer["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("abcd", "length")
    assert choice["logprobs"]["tokens"] == ["a", "b", "c", "d"]
    assert choice["logprobs"]["token_logprobs"] == other["logprobs"]["token_logprobs"][:4]
    assert scored["usage"]["completion_tokens"] == 0


def test_a_request_may_fill_the_queue_but_not_more(server):
    assert len(complete(server, prompt=["ab"] * 72, max_tokens=1).json()["choices"]) == 72
    check_error(complete(server, prompt=["ab"] * 73, max_tokens=1), 400, "takes 72 at a time")


def test_fields_that_change_nothing_are_taken(server):
    fields = {"user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"}
    fields |= {"safety_identifier": "s", "prompt_cache_key": "k", "parallel_tool_calls": True}
    fields |= {"prompt_cache_retention": "24h", "prediction": {"type": "content", "content": ""}}
    plain = complete(server).json()["choices"]
    assert complete(server, **fields).json()["choices"] == plain
