"""Calls of tools and their results in the messages of a chat request."""

import json
from collections.abc import Iterator
from itertools import count
from typing import Any

from ...chat_templates.tool_form import Feature, Message, ToolSupport
from ...errors import RequestError
from .protocol import check_keys, read_text, shown

NOT_WRITTEN: dict[Feature, tuple[str, str]] = {
    "calls": (
        "has calls, but the model's chat template does not write calls",
        "leave them and their results out",
    ),
    "several": (
        "has several calls, but the model's chat template does not write all of them",
        "give each call a message with its result behind it",
    ),
    "text": (
        "has text next to calls, but the model's chat template does not write both",
        "leave the text out",
    ),
    "results": (
        "is tool, but the model's chat template does not write results of tools",
        "leave calls and their results out",
    ),
}
"""What is wrong with a message that the template would not write whole, and a remedy."""


class OpenCalls:
    """The calls of a conversation that have no result yet."""

    def __init__(self) -> None:
        self._ids: set[str] = set()
        self._id_of_function: dict[str, str] = {}
        """Made-up ids of calls in the old form, which names the function only."""
        self._numbers = count()

    def read_calls(self, where: str, message: Message) -> list[Message]:
        """Return the checked calls of an assistant's message; the old form becomes the new one."""
        field, calls = f"{where}.tool_calls", message.get("tool_calls")
        if calls is None:
            calls = []
        if not isinstance(calls, list):
            raise _wrong(field, "must be a list of calls")
        old = message.get("function_call")
        if old is not None:
            if calls:
                raise _wrong(f"{where}.function_call", "is given next to tool_calls; leave it out")
            function = _read_function(f"{where}.function_call", old)
            call_id = f"call{next(self._numbers):05}"  # nine characters, which all templates take
            self._id_of_function[function["name"]] = call_id
            return [{"id": call_id, "type": "function", "function": function}]
        read = [_read_call(f"{field}[{index}]", call) for index, call in enumerate(calls)]
        seen: set[str] = set()
        for index, call in enumerate(read):
            if call["id"] in seen:
                raise _wrong(f"{field}[{index}].id", "is the id of an earlier call; use another")
            seen.add(call["id"])
        self._ids |= seen
        return read

    def read_result(self, where: str, role: str, message: Message) -> str:
        """Return the id of the call that a message has the result of; it is open no longer."""
        if role == "function":
            field = f"{where}.name"
            name = _read_name(field, message.get("name"))
            if name not in self._id_of_function:
                raise _wrong(
                    field,
                    f"is {shown(name)}, but no earlier function_call of it waits for a result; "
                    "name a function that was called, or leave the message out",
                )
            return self._id_of_function.pop(name)
        field = f"{where}.tool_call_id"
        call_id = _read_name(field, message.get("tool_call_id"))
        if call_id not in self._ids:
            raise _wrong(
                field,
                f"is {shown(call_id)}, but no earlier call with this id waits for a result; use "
                "the id of a call, or leave the message out",
            )
        self._ids.remove(call_id)
        return call_id


def _read_call(field: str, call: Any) -> Message:
    if not isinstance(call, dict):
        raise _wrong(field, "must be an object with id, type and function")
    check_keys(field, call, {"id", "type", "function", "index"})  # of a stream, whose parts have it
    if call.get("type") != "function":
        raise _wrong(f"{field}.type", f"is {shown(call.get('type'))}; use function")
    call_id = _read_name(f"{field}.id", call.get("id"))
    function = _read_function(f"{field}.function", call.get("function"))
    return {"id": call_id, "type": "function", "function": function}


def _read_function(field: str, function: Any) -> Message:
    if not isinstance(function, dict):
        raise _wrong(field, "must be an object with name and arguments")
    check_keys(field, function, {"name", "arguments"})
    name = _read_name(f"{field}.name", function.get("name"))
    arguments = _read_arguments(f"{field}.arguments", function.get("arguments"))
    return {"name": name, "arguments": arguments}


def _read_name(field: str, value: Any) -> str:
    if value is None or value == "":
        raise _wrong(field, "is missing; give it")
    return read_text(field, value)


def _read_arguments(field: str, arguments: Any) -> str:
    """Return the text of a JSON object, which every template can be given."""
    text = read_text(field, arguments)
    if not text:
        return "{}"  # some servers write a call without arguments so
    try:
        values = json.loads(text)
        json.dumps(values, ensure_ascii=False, allow_nan=False).encode()
        reason = "" if isinstance(values, dict) else f"it is {shown(values)}"
    except UnicodeEncodeError:
        reason = "it holds half of a surrogate pair"
    except RecursionError:
        reason = "it is nested too deeply"
    except ValueError as error:
        reason = str(error)
    if reason:
        raise _wrong(field, f"is not the text of a JSON object ({reason}); correct it")
    return text


def check_written(messages: list[Message], support: ToolSupport) -> None:
    """Refuse messages of which the chat template would leave something out."""
    for index, message in enumerate(messages):
        for feature, key in _uses(message):
            if feature in support.lacks:
                what, remedy = NOT_WRITTEN[feature]
                raise _wrong(
                    f"messages[{index}].{key}",
                    f"{what} ({support.lacks[feature]}); {remedy}, or start the server with "
                    "another --chat-template",
                )


def _uses(message: Message) -> Iterator[tuple[Feature, str]]:
    """Yield what a message asks of the template, and the key that asks for it."""
    calls = message.get("tool_calls", [])
    if message["role"] == "tool":
        yield "results", "role"
    if calls:
        yield "calls", "tool_calls"
    if len(calls) > 1:
        yield "several", "tool_calls"
    if calls and message["content"]:
        yield "text", "content"


def _wrong(field: str, what: str) -> RequestError:
    return RequestError(f"{field} {what}.", param=field)
