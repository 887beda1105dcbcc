"""Whatever a body holds, the answer is no 5xx, and every refusal names a field in one sentence."""

import json
from math import inf

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moeyard.chat_templates.tool_form import ToolForm
from moeyard.errors import RequestError
from moeyard.serving.api.chat import ChatRequest, parse_chat
from moeyard.serving.api.completions import CompletionRequest, parse_completion
from moeyard.serving.api.protocol import StreamOptions
from moeyard.serving.serve_args import ServeArgs
from moeyard.serving.server import Server

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
    names = [*kind.model_fields, "x", "logit_bias", "user", "tools", "tool_choice", "functions"]
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
        assert all(isinstance(m["content"], str) for m in request.messages)


FUNCTION = {"name": "f", "arguments": '{"a": 1}'}
HISTORY = [
    MESSAGE,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "c", "type": "function", "function": FUNCTION}],
        "reasoning": "hm",
        "refusal": None,
    },
    {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "2"}]},
    {"role": "assistant", "function_call": FUNCTION},
    {"role": "function", "name": "f", "content": None},
]


def places_in(value, path=()):
    """Yield the path of every value inside a value."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in pairs:
        yield (*path, key)
        if isinstance(inner, dict | list):
            yield from places_in(inner, (*path, key))


def parse_messages(messages):
    return parse_chat(json.dumps({"model": "m", "messages": messages}).encode())


TEXTS = ["{}", "[]", "{", '{"a": "\\ud800"}', '{"a": 1e999}', '{"a": ' * 5000, "c", "f", "null"]


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from([*places_in(HISTORY)]),
    JUNK | st.sampled_from([*TEXTS, *HISTORY, HISTORY[1]["tool_calls"], FUNCTION]),
)
def test_a_history_with_anything_anywhere_can_be_written_or_is_refused_in_one_sentence(
    place, value
):
    messages = json.loads(json.dumps(HISTORY))
    holder = messages
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    try:
        request = parse_messages(messages)
    except RequestError as error:
        assert error.status == 400 and "\n" not in str(error)
        assert (error.param or "").startswith("messages") or "Infinity" in str(error)
        return
    for form in (ToolForm(), ToolForm(has_objects=False, has_short_ids=True)):
        worded = form.word(request.messages)
        json.dumps(worded, ensure_ascii=False, allow_nan=False).encode()
        assert [m["role"] for m in worded] == [m["role"] for m in request.messages]


def with_call(message=None, call=None, function=None):
    """Return the history up to its first call, changed."""
    call = {"id": "c", "type": "function", "function": FUNCTION | (function or {}), **(call or {})}
    return [MESSAGE, {"role": "assistant", "tool_calls": [call], **(message or {})}]


CALL = "messages[1].tool_calls[0]"
ARGUMENTS = f"{CALL}.function.arguments"
SURROGATE = "holds half of a surrogate pair"
WRONG_HISTORIES = {
    "calls": (with_call({"tool_calls": {}}), "messages[1].tool_calls", "must be a list of calls"),
    "call": (with_call({"tool_calls": [3]}), CALL, "must be an object with id, type and function"),
    "id": (with_call(call={"id": None}), f"{CALL}.id", "is missing"),
    "id_number": (with_call(call={"id": 3}), f"{CALL}.id", "is 3; use a string"),
    "id_text": (with_call(call={"id": "\ud800"}), f"{CALL}.id", SURROGATE),
    "type": (with_call(call={"type": "custom"}), f"{CALL}.type", "is 'custom'; use function"),
    "key": (with_call(call={"x": 1}), f"{CALL}.x", "is not supported; leave it out"),
    "function": (with_call(call={"function": 1}), f"{CALL}.function", "must be an object"),
    "name": (with_call(function={"name": ""}), f"{CALL}.function.name", "is missing"),
    "name_text": (with_call(function={"name": "\udc00"}), f"{CALL}.function.name", SURROGATE),
    "object": (with_call(function={"arguments": {}}), ARGUMENTS, "is {}; use a string"),
    "no_json": (with_call(function={"arguments": "{"}), ARGUMENTS, "is not the text of a JSON obj"),
    "list": (with_call(function={"arguments": "[1]"}), ARGUMENTS, "(it is [1]); correct it"),
    "infinite": (
        with_call(function={"arguments": '{"a": 1e999}'}),
        ARGUMENTS,
        "not JSON",
    ),
    "deep": (with_call(function={"arguments": '{"a":' * 9999}), ARGUMENTS, "nested too deeply"),
    "text": (with_call(function={"arguments": "\ud800"}), ARGUMENTS, SURROGATE),
    "escape": (with_call(function={"arguments": '{"a": "\\ud800"}'}), ARGUMENTS, SURROGATE),
    "both": (with_call({"function_call": FUNCTION}), "messages[1].function_call", "leave it out"),
    "twice": (
        with_call({"tool_calls": HISTORY[1]["tool_calls"] * 2}),
        "messages[1].tool_calls[1].id",
        "is the id of an earlier call",
    ),
    "users_calls": (with_call({"role": "user"}), "messages[1].tool_calls", "is not supported"),
    "users_thoughts": ([{**MESSAGE, "reasoning": "a"}], "messages[0].reasoning", "not supported"),
    "thoughts": (with_call({"reasoning_content": 1}), "messages[1].reasoning_content", "is 1; use"),
    "thoughts_text": (with_call({"reasoning": "\ud800"}), "messages[1].reasoning", SURROGATE),
    "refusal": (with_call({"refusal": 1}), "messages[1].refusal", "is 1; use a string"),
    "sound": (with_call({"audio": {"id": "a"}}), "messages[1].audio", "is not supported"),
    "no_id": (
        [MESSAGE, {"role": "tool", "content": "2"}],
        "messages[1].tool_call_id",
        "is missing",
    ),
    "no_call": ([MESSAGE, HISTORY[2]], "messages[1].tool_call_id", "no earlier call with this id"),
    "late_call": ([HISTORY[2], HISTORY[1]], "messages[0].tool_call_id", "no earlier call"),
    "two_results": ([*HISTORY[:3], HISTORY[2]], "messages[3].tool_call_id", "no earlier call"),
    "no_result": (
        [*HISTORY[:2], {**HISTORY[2], "content": None}],
        "messages[2].content",
        "must be a string or a list of text parts",
    ),
    "no_function": ([MESSAGE, HISTORY[4]], "messages[1].name", "no earlier function_call of it"),
    "sound_part": (
        [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}],
        "messages[0].content[0]",
        "is not a text part",
    ),
}


@pytest.mark.parametrize("case", WRONG_HISTORIES)
def test_what_is_wrong_in_a_history_is_named(case):
    messages, param, message = WRONG_HISTORIES[case]
    with pytest.raises(RequestError) as error:
        parse_messages(messages)
    assert error.value.param == param and message in str(error.value)
    assert str(error.value).startswith(f"{param} ") and str(error.value).endswith(".")


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
