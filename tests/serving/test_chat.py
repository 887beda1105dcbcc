"""Chat: the model folder's template makes the prompt, OpenAI's objects carry the answer."""

import json
import shutil

import pytest

from moeyard.errors import ConfigError
from moeyard.serving.serve_args import ServeArgs
from moeyard.serving.server import Server, check_model

from http_calls import call, check_error, chunks

TEMPLATE = r"""{%- for message in messages -%}
{%- if message.role == 'system' and not loop.first -%}
{{ raise_exception('a system message comes first') }}
{%- endif -%}
{%- if message.reasoning_content -%}<think>{{ message.reasoning_content }}{%- endif -%}
<{{ message.role }}>{{ message.content }}
{%- for call in message.tool_calls or [] -%}
<call {{ call.id }}>{{ call.function.name }} {{ call.function.arguments | tojson }}
{%- endfor -%}
{%- if message.tool_call_id -%}<of {{ message.tool_call_id }}>{%- endif -%}
{{ '\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}<assistant>{%- endif -%}"""
USER = [{"role": "user", "content": "hi"}]
FUNCTION = {"name": "add", "arguments": '{"a": 1, "b": [2]}'}
CALL = {"id": "call_1", "type": "function", "function": FUNCTION}
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "3"}
BODY = {"model": "chatty", "messages": USER, "max_tokens": 8, "temperature": 0}


def calling(*calls, **changes):
    return {"role": "assistant", "content": None, "tool_calls": list(calls), **changes}


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
    assert answer["choices"] == other["choices"]
    assert answer["usage"]["total_tokens"] == other["usage"]["total_tokens"]


def test_a_template_may_write_the_name_of_a_speaker(chatty_folder, tmp_path):
    template = tmp_path / "names.jinja"
    template.write_text("{% for m in messages %}{{ m.name }}:{{ m.content }}{% endfor %}")
    named = Server(ServeArgs(model=str(chatty_folder), chat_template=str(template)))
    try:
        answer = chat(named, messages=[{**USER[0], "name": "kim"}]).json()
        assert answer["usage"]["prompt_tokens"] == len("kim:hi")
        refused = chat(named, messages=[*USER, calling(CALL), RESULT])
    finally:
        named.close()
    message = "messages[1].tool_calls has calls, but the model's chat template does not write calls"
    error = check_error(refused, 400, f"{message} (it leaves them out); leave them and their resul")
    assert error["param"] == "messages[1].tool_calls"


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
    assert answer["usage"]["total_tokens"] == plain["usage"]["total_tokens"]
    assert answer["usage"]["prompt_tokens"] == len(prompt)
    assert plain["usage"]["prompt_tokens_details"] == {"cached_tokens": 48}


ADD = 'add {"a": 1, "b": [2]}'
HISTORIES = {
    "calls": (
        [calling(CALL), RESULT],
        f"<assistant><call call_1>{ADD}\n<tool>3<of call_1>\n",
    ),
    "no_content": (
        [{k: v for k, v in calling(CALL).items() if k != "content"}],
        f"<assistant><call call_1>{ADD}\n",
    ),
    "blank_content": ([calling(CALL, content=" \n")], f"<assistant><call call_1>{ADD}\n"),
    "text_and_calls": (
        [calling({**CALL, "index": 0}, {**CALL, "id": "b"}, content="so"), RESULT],
        f"<assistant>so<call call_1>{ADD}<call b>{ADD}\n<tool>3<of call_1>\n",
    ),
    "no_arguments": (
        [calling({**CALL, "function": {"name": "now", "arguments": ""}})],
        "<assistant><call call_1>now {}\n",
    ),
    "parts": (
        [calling(CALL), {**RESULT, "content": [{"type": "text", "text": t} for t in "34"]}],
        f"<assistant><call call_1>{ADD}\n<tool>34<of call_1>\n",
    ),
    "old": (
        [
            {"role": "assistant", "content": None, "function_call": FUNCTION},
            {"role": "function", "name": "add", "content": "3"},
        ],
        f"<assistant><call call00000>{ADD}\n<tool>3<of call00000>\n",
    ),
    "id_again": (
        [calling(CALL), RESULT, calling(CALL), RESULT],
        f"<assistant><call call_1>{ADD}\n<tool>3<of call_1>\n" * 2,
    ),
    "reasoning": (
        [{"role": "assistant", "content": "a", "reasoning": "hm", "reasoning_content": "hm"}],
        "<think>hm<assistant>a\n",
    ),
    "reasoning_alone": (
        [{"role": "assistant", "content": None, "reasoning": "hm"}],
        "<think>hm<assistant>\n",
    ),
    "refusal": ([{"role": "assistant", "content": None, "refusal": "no"}], "<assistant>no\n"),
    "kinds_of_parts": (
        [
            {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
            {
                "role": "assistant",
                "content": [{"type": "output_text", "text": "b", "annotations": []}],
            },
        ],
        "<user>a\n<assistant>no\n<assistant>b\n",
    ),
}


@pytest.mark.parametrize("case", HISTORIES)
def test_a_history_reaches_the_model_as_the_template_writes_it(server, case):
    messages, written = HISTORIES[case]
    answer = chat(server, messages=[*USER, *messages], max_tokens=2)
    prompt = f"<user>hi\n{written}<assistant>"
    plain = complete(server, prompt, max_tokens=2)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["prompt_tokens"] == len(prompt)
    assert answer.json()["choices"][0]["message"]["content"] == plain["choices"][0]["text"]


TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
OLD_TOOLS = [{"name": "add", "description": "adds"}]


def test_tools_that_may_not_be_called_change_nothing(server):
    plain = chat(server).json()
    for options in (
        {"tools": TOOLS, "tool_choice": "none"},
        {"functions": OLD_TOOLS, "function_call": "none"},
    ):
        answer = chat(server, **options).json()
        assert (answer["choices"], answer["usage"]) == (plain["choices"], plain["usage"])


def test_continuous_usage_counts_the_tokens_of_every_chunk_of_a_chat(server):
    options = {"include_usage": True, "continuous_usage_stats": True}
    *pieces, last = chunks(chat(server, stream=True, logprobs=True, stream_options=options))
    assert [piece["usage"]["completion_tokens"] for piece in pieces] == list(range(9))
    tokens = last["usage"]["prompt_tokens"]
    assert tokens == len("<user>hi\n<assistant>")
    for piece in pieces:
        usage = piece["usage"]
        assert usage["prompt_tokens"] == tokens
        assert usage["total_tokens"] == tokens + usage["completion_tokens"]
    assert last["choices"] == [] and last["usage"] == pieces[-1]["usage"]


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
    "role": ({"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role is 'robot'; use"),
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
        "messages[0].tool_calls[0].type is None; use function",
    ),
    "name": ({"messages": [{**USER[0], "name": 3}]}, "messages[0].name is 3; use a string"),
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
    "tools": ({"tools": TOOLS}, 'tools out or send tool_choice = "none"'),
    "chosen_tools": (
        {"tools": TOOLS, "tool_choice": "required"},
        "tools cannot be called",
    ),
    "functions": ({"functions": OLD_TOOLS}, 'functions out or send function_call = "none"'),
    "choice_alone": ({"tool_choice": "auto"}, "tool_choice is 'auto' without tools"),
    "tools_shape": ({"tools": [TOOLS], "tool_choice": "none"}, "tools[0] must be an object of"),
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
