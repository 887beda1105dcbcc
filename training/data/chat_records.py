"""Conversations from JSON files, in the shapes that people have."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import DataError
from .documents import RECORD_SUFFIXES, Files, TextFile, is_unicode
from .records import NotJson, read_records

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


class Conversations:
    """The conversations of a file, or of all JSON files below a folder."""

    def __init__(self, source: str, field: str) -> None:
        """``field`` is the configuration key whose value ``source`` is."""
        path = Path(source)
        found = [path]
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix.lower() in RECORD_SUFFIXES)
        if not found or not all(p.is_file() for p in found):
            raise DataError(
                f"{field} is {source!r}, but data.format is chat; give a .jsonl, .ndjson or .json "
                "file, or a folder of these."
            )
        self._paths, self._source, self._field = found, source, field

    def __iter__(self) -> Iterator[tuple[str, list[Message]]]:
        """Yield where each conversation stands, and its messages."""
        for path in self._paths:
            try:
                for where, record in read_records(
                    TextFile(path, self._source, self._field).blocks()
                ):
                    yield f"{path} {where}", messages_of(record, f"{path} {where}")
            except NotJson as error:
                raise DataError(f"{path} {error.where} is not JSON; correct it.") from None

    def fingerprint(self) -> str | None:
        """Identify the files without reading them; None while one has just changed."""
        return Files(self._paths, self._source, "", self._field).fingerprint()


def messages_of(record: Any, where: str) -> list[Message]:
    """Return the messages of a JSON object of one of the known shapes.

    Raises :class:`DataError` for other shapes, unknown roles and conversations without an answer.
    """
    messages = [_checked(message, where) for message in _messages(record, where)]
    if isinstance(record, dict) and record.get("tools"):
        raise DataError(f"{where} has tools, which are not supported; take them out.")
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(f"{where} has no assistant message, so nothing to learn; take it out.")
    return messages


def _checked(message: Message, where: str) -> Message:
    """Return a message whose content is one text."""
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise DataError(f"{where} has the role {role!r}; use one of {', '.join(ROLES)}.")
    if message.get("weight", 1) != 1:
        raise DataError(
            f"{where} has a message of weight {message['weight']!r}; all answers are trained on, "
            "so take weight out, or the conversation."
        )
    if role == "assistant" and content is None and message.get("tool_calls"):
        return message
    if content and isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else None for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        content = "".join(texts) if len(texts) == len(parts) else content
    if not isinstance(content, str) or not is_unicode(content):
        raise DataError(f"{where} has a message with content {content!r}; give valid text.")
    return message | {"content": content}


def _messages(record: Any, where: str) -> list[Message]:
    found: Any = None
    if isinstance(record, dict):
        if "messages" in record:
            found = record["messages"]
        elif "conversations" in record:
            found = [_from_sharegpt(turn, where) for turn in _list(record["conversations"])]
        elif "prompt" in record and "completion" in record:
            prompt = _side(record["prompt"], "user")
            completion = _side(record["completion"], "assistant")
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


def _side(value: Any, role: str) -> list[Any]:
    """Return one side of a prompt and completion, which is text or messages."""
    return [{"role": role, "content": value}] if isinstance(value, str) else _list(value)


def _from_sharegpt(turn: Any, where: str) -> Message:
    speaker = turn.get("from") if isinstance(turn, dict) else None
    if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
        known = ", ".join(SHAREGPT_ROLES)
        raise DataError(f'{where} has a turn "from" {speaker!r}; use one of {known}.')
    return {"role": SHAREGPT_ROLES[speaker], "content": turn.get("value")}
