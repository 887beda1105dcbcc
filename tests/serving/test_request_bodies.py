"""Whatever a body holds, the answer is no 5xx, and every refusal names a field in one sentence."""

import json
from math import inf

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moeyard.errors import RequestError
from moeyard.serving.api.chat import ChatRequest, parse_chat
from moeyard.serving.api.completions import CompletionRequest, parse_completion
from moeyard.serving.api.protocol import StreamOptions
from moeyard.serving.server import ServeArgs, Server

from http_calls import call, check_error

VOCABULARY = 257
NUMBERS = [-1, 0, 1, VOCABULARY - 1, VOCABULARY, 1 << 31, 1 << 63, -(1 << 63) - 1, 1 << 70]
PLAIN = [
    None,
    True,
    False,
    0.0,
    1.5,
    -0.0,
    1e308,
    "",
    "a",
    "\ud800",
    "\0",
    [],
    {},
    [None],
    *NUMBERS,
]
JUNK = st.recursive(
    st.sampled_from(PLAIN) | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "x"]), inner, max_size=3
        )
    ),
    max_leaves=6,
)
MESSAGE = {"role": "user", "content": "a"}
KINDS = [
    (CompletionRequest, parse_completion, {"model": "m", "prompt": "a"}),
    (ChatRequest, parse_chat, {"model": "m", "messages": [MESSAGE]}),
]


@pytest.fixture(scope="module")
def server(model_folder):
    server = Server(ServeArgs(model=str(model_folder), served_model_name="m"))
    yield server
    server.close()


@pytest.mark.parametrize(("kind", "parse", "base"), KINDS, ids=["completion", "chat"])
@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_every_field_is_read_or_refused_in_one_sentence(kind, parse, base, data):
    names = [*kind.model_fields, "x", "logit_bias", "user"]
    changes = data.draw(st.dictionaries(st.sampled_from(names), JUNK, max_size=2))
    body = json.dumps({**base, **changes}).encode()
    try:
        request = parse(body)
    except RequestError as error:
        assert error.status == 400 and "\n" not in str(error)
        return
    assert request.num_answers >= 1  # what the server asks of a request that it takes
    if kind is CompletionRequest:
        assert all(isinstance(prompt, str | list) for prompt in request.prompts())
    else:
        assert all(isinstance(m["content"], str) for m in request.conversation())


@pytest.mark.parametrize("field", StreamOptions.model_fields)
@pytest.mark.parametrize("value", [1, 0.0, "true", [], {}], ids=repr)
def test_options_of_a_stream_take_booleans_only(field, value):
    body = {"model": "m", "prompt": "a", "stream": True, "stream_options": {field: value}}
    with pytest.raises(RequestError, match="stream_options"):
        parse_completion(json.dumps(body).encode())


BARE = [0, 5, -1, VOCABULARY, 1 << 63, True, False, 0.0, 1.5, {}]
LISTED = [-1, VOCABULARY, 1 << 63, 1 << 70, True, False, 0.0, 1.5, None]


@pytest.mark.parametrize(
    "prompt", [*BARE, *([1, x] for x in LISTED), *([[x]] for x in LISTED), [[]], [[1], 2], ["a", 1]]
)
def test_a_prompt_of_another_kind_gets_400_naming_it(server, prompt):
    answer = call(server, "POST", "/v1/completions", json={"model": "m", "prompt": prompt})
    assert check_error(answer, 400, "prompt")["param"] == "prompt"


@pytest.mark.parametrize("field", ["max_tokens", "n", "seed", "top_k", "logprobs"])
@pytest.mark.parametrize("value", [-1 - (1 << 63), 1 << 63, 1 << 70, True, 0.5, "1"], ids=repr)
def test_a_number_out_of_range_or_of_another_kind_gets_400(server, field, value):
    if (field, value) in {("top_k", 1 << 63), ("top_k", 1 << 70)}:
        value = -value  # any upper bound of top_k is all there is
    body = {"model": "m", "prompt": "a", field: value}
    check_error(call(server, "POST", "/v1/completions", json=body), 400, field)


def test_numbers_that_json_does_not_have_are_refused(server):
    body = json.dumps({"model": "m", "prompt": "a", "temperature": inf})
    check_error(call(server, "POST", "/v1/completions", content=body), 400, "Infinity")
