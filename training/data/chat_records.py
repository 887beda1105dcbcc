"""Conversations from JSON files, in the shapes that people have."""

import hashlib
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from ...errors import DataError
from .documents import is_unicode
from .record_files import RecordFiles

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
"""Our names of the speakers in ShareGPT's ``from``."""
SHAPES = (
    '{"messages": [{"role": ..., "content": ...}]}, {"prompt": ..., "completion": ...} or '
    '{"conversations": [{"from": ..., "value": ...}]}'
)

Message = dict[str, Any]


class Conversation(NamedTuple):
    """What is rendered, and which of it is trained on."""

    messages: list[Message]
    is_trained: list[bool]
    """For each message, whether the assistant says it and is to learn it."""
    tools: list[dict[str, Any]] | None = None
    """Functions that the assistant may call, as JSON schemas."""

    def digest(self) -> bytes:
        """Return a hash that tells it from others."""
        text = json.dumps([self.messages, self.tools], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).digest()


class Conversations:
    """The conversations of a file, or of all JSON files below a folder."""

    def __init__(self, source: str, field: str) -> None:
        """``field`` is the configuration key whose value ``source`` is."""
        self._files = RecordFiles(source, field, "chat")

    def __iter__(self) -> Iterator[tuple[str, Conversation]]:
        """Yield where each conversation stands, and what it says."""
        for where, record in self._files:
            yield where, conversation_of(record, where)

    def fingerprint(self) -> str | None:
        """Identify the files without reading them; None while one has just changed."""
        return self._files.fingerprint()


def conversation_of(record: Any, where: str) -> Conversation:
    """Return the conversation in a JSON object of one of the known shapes.

    Raises :class:`DataError` for other shapes, unknown roles and conversations without an answer to
    train on.
    """
    messages = [checked_message(message, where) for message in _messages(record, where)]
    weights = [message.pop("weight", None) for message in messages]
    is_trained = [
        message["role"] == "assistant" and weight != 0
        for message, weight in zip(messages, weights, strict=True)
    ]
    if not any(is_trained):
        raise DataError(
            f"{where} has no assistant message, or all of weight 0, so nothing to learn; take it "
            "out."
        )
    return Conversation(messages, is_trained, tools_of(record, where))


def tools_of(record: Any, where: str) -> list[dict[str, Any]] | None:
    """Return a record's tools, which may be a list or, where columns have one type, its JSON."""
    tools = record.get("tools") if isinstance(record, dict) else None
    if isinstance(tools, str):
        try:
            tools = json.loads(tools or "null")
        except (ValueError, RecursionError):
            raise DataError(f"{where} has tools that are not JSON; correct them.") from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"{where} has the tools {tools!r}; give a list of JSON schemas.")
    return tools


def checked_message(message: Message, where: str) -> Message:
    """Return a message whose content is one text, or absent where it only calls tools."""
    # Templates tell a missing key from a value, and would spell None. Servers drop it as well.
    said = {key: value for key, value in message.items() if value is not None}
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise DataError(f"{where} has the role {role!r}; use one of {', '.join(ROLES)}.")
    if message.get("weight") not in (None, 0, 1):
        raise DataError(
            f"{where} has a message of weight {message['weight']!r}; use 1 to train on an answer "
            "and 0 to leave it out."
        )
    if role == "assistant" and content is None and message.get("tool_calls"):
        return said
    if content and isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else None for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        content = "".join(texts) if len(texts) == len(parts) else content
    if not isinstance(content, str) or not is_unicode(content):
        raise DataError(f"{where} has a message with content {content!r}; give valid text.")
    return said | {"content": content}


def _messages(record: Any, where: str) -> list[Message]:
    found: Any = None
    if isinstance(record, dict):
        if "messages" in record:
            found = record["messages"]
        elif "conversations" in record:
            found = [_from_sharegpt(turn, where) for turn in _list(record["conversations"])]
        elif "prompt" in record and "completion" in record:
            prompt = messages_of_side(record["prompt"], "user")
            completion = messages_of_side(record["completion"], "assistant")
            found = [*prompt, *completion] if prompt and completion else None
            if any(isinstance(part, dict) and part.get("role") == "assistant" for part in prompt):
                raise DataError(
                    f"{where} has an answer in its prompt, but all answers are trained on; give "
                    "the conversation as messages if that is right."
                )
    if not _list(found) or not all(isinstance(message, dict) for message in found):
        raise DataError(f"{where} is not a conversation; use {SHAPES}.")
    return list(found)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def messages_of_side(value: Any, role: str) -> list[Any]:
    """Return one side of a prompt and completion, which is text or messages."""
    return [{"role": role, "content": value}] if isinstance(value, str) else _list(value)


def _from_sharegpt(turn: Any, where: str) -> Message:
    speaker = turn.get("from") if isinstance(turn, dict) else None
    if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
        known = ", ".join(SHAREGPT_ROLES)
        raise DataError(f'{where} has a turn "from" {speaker!r}; use one of {known}.')
    return {"role": SHAREGPT_ROLES[speaker], "content": turn.get("value")}
