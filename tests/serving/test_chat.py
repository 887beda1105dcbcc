"""Chat: the model folder's template makes the prompt, OpenAI's objects carry the answer."""

import json
import shutil

import pytest

from moeyard.errors import ConfigError
from moeyard.serving.server import ServeArgs, Server, check_model

from http_calls import call, check_error, chunks

TEMPLATE = """{%- for message in messages -%}
{%- if message.role == 'system' and not loop.first -%}
{{ raise_exception('a system message comes first') }}
{%- endif -%}
<{{ message.role }}>{{ message.content }}
{% endfor -%}
{%- if add_generation_prompt -%}<assistant>{%- endif -%}"""
USER = [{"role": "user", "content": "hi"}]
BODY = {"model": "chatty", "messages": USER, "max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def chatty_folder(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat") / "chatty"
    shutil.copytree(model_folder, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def server(chatty_folder):
    running = Server(ServeArgs(model=str(chatty_folder)))
    yield running
    running.close()


def chat(server, **changes):
    return call(server, "POST", "/v1/chat/completions", json={**BODY, **changes})


def test_an_answer_may_come_back_as_clients_dump_it(server):
    empty = {"refusal": None, "audio": None, "function_call": None, "annotations": []}
    part = {"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}
    plain = [*USER, {"role": "assistant", "content": "yo"}, *USER]
    dumped = [
        {"role": "user", "content": [part], "name": "kim"},
        {"role": "assistant", "content": "yo", "tool_calls": [], **empty},
        *USER,
    ]
    answer, other = chat(server, messages=dumped).json(), chat(server, messages=plain).json()
    assert answer["choices"] == other["choices"] and answer["usage"] == other["usage"]


def test_a_template_may_write_the_name_of_a_speaker(chatty_folder, tmp_path):
    template = tmp_path / "names.jinja"
    template.write_text("{% for m in messages %}{{ m.name }}:{{ m.content }}{% endfor %}")
    named = Server(ServeArgs(model=str(chatty_folder), chat_template=str(template)))
    try:
        answer = chat(named, messages=[{**USER[0], "name": "kim"}]).json()
    finally:
        named.close()
    assert answer["usage"]["prompt_tokens"] == len("kim:hi")


def complete(server, prompt, **changes):
    body = {"model": "chatty", "prompt": prompt, "max_tokens": 8, "temperature": 0, **changes}
    return call(server, "POST", "/v1/completions", json=body).json()


def test_answers_as_the_completion_of_the_rendered_template(server):
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]},
        {"role": "assistant", "content": "yes", "refusal": None},
        {"role": "user", "content": "more"},
    ]
    prompt = "<system>be brief\n<user>hi\n<assistant>yes\n<user>more\n<assistant>"
    answer, plain = chat(server, messages=messages).json(), complete(server, prompt)
    assert answer["object"] == "chat.completion" and answer["id"].startswith("chatcmpl-")
    (choice,) = answer["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": plain["choices"][0]["text"],
        "refusal": None,
    }
    assert choice["finish_reason"] == "length" and choice["logprobs"] is None
    assert answer["usage"] == plain["usage"] and answer["usage"]["prompt_tokens"] == len(prompt)


def test_a_stream_begins_with_the_role_and_joins_to_the_plain_answer(server):
    plain = chat(server, n=2, temperature=1.0, seed=3).json()
    streamed = chat(
        server, n=2, temperature=1.0, seed=3, stream=True, stream_options={"include_usage": True}
    )
    assert streamed.headers["content-type"].startswith("text/event-stream")
    *pieces, usage = chunks(streamed)
    assert all(piece["object"] == "chat.completion.chunk" for piece in pieces)
    assert len({piece["id"] for piece in pieces}) == 1
    for index in range(2):
        choices = [p["choices"][0] for p in pieces if p["choices"][0]["index"] == index]
        assert choices[0]["delta"] == {"role": "assistant", "content": ""}
        text = "".join(c["delta"].get("content", "") for c in choices)
        assert text == plain["choices"][index]["message"]["content"]
        assert [c["finish_reason"] for c in choices[:-1]] == [None] * (len(choices) - 1)
        assert choices[-1]["finish_reason"] == plain["choices"][index]["finish_reason"]
    assert usage["choices"] == [] and usage["usage"] == plain["usage"]


def test_without_a_limit_an_answer_may_fill_the_context(server):
    body = {key: value for key, value in BODY.items() if key != "max_tokens"}
    answer = call(server, "POST", "/v1/chat/completions", json=body).json()
    assert answer["usage"]["total_tokens"] == 256
    limited = call(
        server, "POST", "/v1/chat/completions", json={**body, "max_completion_tokens": 3}
    )
    assert limited.json()["usage"]["completion_tokens"] == 3


BAD = {
    "no_messages": ({"messages": None}, "messages is missing"),
    "empty": ({"messages": []}, "messages must be a list with at least one message"),
    "text": ({"messages": "hi"}, "messages must be a list"),
    "item": ({"messages": ["hi"]}, "messages[0] must be an object"),
    "role": ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role is 'tool'; use"),
    "no_role": ({"messages": [*USER, {"content": "a"}]}, "messages[1].role is None"),
    "no_content": ({"messages": [{"role": "user"}]}, "messages[0].content must be a string"),
    "image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content[0] is not a text part",
    ),
    "part": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]},
        "messages[0].content[0] must have type and text",
    ),
    "calls": (
        {"messages": [{"role": "assistant", "content": "a", "tool_calls": [{}]}]},
        "messages[0].tool_calls is not supported",
    ),
    "name": ({"messages": [{**USER[0], "name": 3}]}, "messages[0].name is not supported"),
    "surrogate_name": (
        {"messages": [{**USER[0], "name": "\ud800"}]},
        "messages[0].name holds half of a surrogate pair",
    ),
    "surrogate": (
        {"messages": [{"role": "user", "content": "\ud800"}]},
        "messages[0].content holds half of a surrogate pair",
    ),
    "template": (
        {"messages": [*USER, {"role": "system", "content": "late"}]},
        "template refuses these messages (a system message comes first)",
    ),
    "tools": ({"tools": [{"type": "function"}]}, "tools is not supported"),
    "format": ({"response_format": {"type": "json_object"}}, "response_format is not supported"),
    "two_limits": ({"max_completion_tokens": 9}, "max_tokens is 8 and max_completion_tokens 9"),
    "top": ({"top_logprobs": 3}, "top_logprobs needs logprobs = true"),
    "many": ({"logprobs": True, "top_logprobs": 21}, "top_logprobs is 21"),
    "number": ({"logprobs": 1}, "logprobs is 1"),
    "prompt": ({"prompt": "a"}, "prompt is not a known parameter"),
    "long": (
        {"messages": [{"role": "user", "content": "x" * 300}]},
        "context length is 256 tokens",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_answered_gets_400_naming_the_field(server, case):
    changes, message = BAD[case]
    # json.dumps spells half a surrogate pair, which httpx's own encoding cannot.
    content = json.dumps({**BODY, **changes}).encode()
    error = check_error(call(server, "POST", "/v1/chat/completions", content=content), 400, message)
    assert error["param"] is not None and error["param"] in (message, *message.split(), "messages")


def test_a_folder_without_a_template_says_what_to_do(model_folder, tmp_path):
    server = Server(ServeArgs(model=str(model_folder)))
    check_error(chat(server, model="small"), 400, "no chat template; start the server with --chat")
    server.close()
    file = tmp_path / "template.jinja"
    file.write_text("{{ messages[0].content }}")
    server = Server(ServeArgs(model=str(model_folder), chat_template=str(file)))
    answer = chat(server, model="small").json()
    assert answer["usage"]["prompt_tokens"] == 2
    server.close()


def test_a_template_that_cannot_be_used_is_refused_at_the_start(model_folder, tmp_path):
    args = ServeArgs(model=str(model_folder), chat_template=str(tmp_path / "none.jinja"))
    with pytest.raises(ConfigError, match=r"none.jinja cannot be read \(No such file"):
        check_model(args)
    (tmp_path / "none.jinja").write_text("{% for %}")
    with pytest.raises(ConfigError, match="is not Jinja"):
        check_model(args)


def test_a_template_cannot_reach_out_of_its_sandbox(model_folder, tmp_path):
    file = tmp_path / "template.jinja"
    file.write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    server = Server(ServeArgs(model=str(model_folder), chat_template=str(file)))
    check_error(chat(server, model="small"), 400, "unsafe")
    server.close()
