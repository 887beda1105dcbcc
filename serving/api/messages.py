"""The messages of a chat request: checked, and brought to the form that templates are given."""

from typing import Any

from ...chat_templates.tool_form import Message
from ...errors import RequestError
from .protocol import check_keys, read_text, shown
from .tool_messages import OpenCalls

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
"""OpenAI's roles, and what chat templates call them."""
PART_TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Kinds of text parts, and the key that has the text."""
KEYS = {
    "assistant": ("tool_calls", "function_call", "reasoning_content", "reasoning", "refusal"),
    "tool": ("tool_call_id",),
}
"""What messages of a role may have next to role, content and name."""


def read_messages(messages: Any) -> list[Message]:
    """Return messages with ``role``, ``content`` and what else a template may write, nothing null.

    Checks by hand, so that every :class:`RequestError` names the message and the field.
    """
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages must be a list with at least one message.", param="messages")
    calls = OpenCalls()
    return [
        _read_message(f"messages[{index}]", message, calls)
        for index, message in enumerate(messages)
    ]


def _read_message(where: str, message: Any, calls: OpenCalls) -> Message:
    if not isinstance(message, dict):
        raise RequestError(f"{where} must be an object with role and content.", param=where)
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise RequestError(
            f"{where}.role is {shown(role)}; use one of {', '.join(ROLES)}.", param=f"{where}.role"
        )
    asked = {key: value for key, value in message.items() if not _is_neutral(key, value)}
    check_keys(where, asked, {"role", "content", "name", *KEYS.get(role, ())})
    read: Message = {"role": ROLES[role]}
    if message.get("name") is not None:
        read["name"] = read_text(f"{where}.name", message["name"])
    extra: Message = {}
    if role == "assistant":
        extra = _read_assistant(where, message, calls)
    elif ROLES[role] == "tool":
        extra = {"tool_call_id": calls.read_result(where, role, message)}
    content = message.get("content")
    if content is None and role == "assistant":
        content = message.get("refusal")  # what it said in place of an answer
    if content is None and (role == "function" or (role == "assistant" and extra)):
        content = ""
    read["content"] = _read_content(f"{where}.content", content)
    if "tool_calls" in extra and not any(text.strip() for text in _texts_of(read["content"])):
        read["content"] = ""  # templates would take blanks for text
    return read | extra


def _is_neutral(key: str, value: Any) -> bool:
    if key == "annotations":
        return isinstance(value, list)  # links that the text has already
    return key == "tool_calls" and value == []


def _read_assistant(where: str, message: Message, calls: OpenCalls) -> Message:
    """Return the calls and the thoughts of the assistant, what it has of them."""
    read: Message = {}
    for key in ("reasoning", "reasoning_content"):  # two names of one thing; the last one counts
        if message.get(key) is not None:
            read["reasoning_content"] = read_text(f"{where}.{key}", message[key])
    if message.get("refusal") is not None:
        read_text(f"{where}.refusal", message["refusal"])
    made = calls.read_calls(where, message)
    if made:
        read["tool_calls"] = made
    return read


def _read_content(where: str, content: Any) -> str | list[dict[str, str]]:
    if isinstance(content, str):
        return read_text(where, content)
    if not isinstance(content, list) or not content:
        raise RequestError(f"{where} must be a string or a list of text parts.", param=where)
    return [_read_part(where, f"{where}[{index}]", part) for index, part in enumerate(content)]


def _read_part(where: str, field: str, part: Any) -> dict[str, str]:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str) or kind not in PART_TEXTS:
        raise RequestError(f"{field} is not a text part; only text is supported.", param=field)
    key = PART_TEXTS[kind]
    given = {name for name, value in part.items() if value is not None}
    if given - {"cache_control", "annotations"} != {"type", key} or not isinstance(part[key], str):
        raise RequestError(f"{field} must have type and {key}, a string.", param=field)
    return {"type": "text", "text": read_text(where, part[key])}


def _texts_of(content: str | list[dict[str, str]]) -> list[str]:
    return [content] if isinstance(content, str) else [part["text"] for part in content]
