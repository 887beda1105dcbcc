"""Preference pairs from JSON files: a prompt, the answer that was chosen, and one that was not."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from ...errors import DataError
from .chat_records import (
    Conversation,
    Message,
    checked_message,
    messages_of_side,
    tools_of,
)
from .record_files import RecordFiles

SHAPES = (
    '{"prompt": ..., "chosen": ..., "rejected": ...}, each a text or a list of messages, or '
    '{"chosen": [...], "rejected": [...]} with whole conversations'
)
SIDES = ("chosen", "rejected")


class Pair(NamedTuple):
    """Two conversations that begin alike; only what follows the prompt is compared."""

    chosen: Conversation
    rejected: Conversation

    def digest(self) -> bytes:
        """Return a hash that tells it from others."""
        return self.chosen.digest() + self.rejected.digest()


class Pairs:
    """The pairs of a file, or of all JSON files below a folder."""

    def __init__(self, source: str, field: str) -> None:
        """``field`` is the configuration key whose value ``source`` is."""
        self._files = RecordFiles(source, field, "preference")

    def __iter__(self) -> Iterator[tuple[str, Pair]]:
        """Yield where each pair stands, and what it says."""
        for where, record in self._files:
            yield where, pair_of(record, where)

    def fingerprint(self) -> str | None:
        """Identify the files without reading them; None while one has just changed."""
        return self._files.fingerprint()


def pair_of(record: Any, where: str) -> Pair:
    """Return the pair in a JSON object of one of the known shapes.

    A side is an answer to the record's prompt, or a whole conversation. Without a prompt, what both
    sides begin with is the prompt; it leaves each side a message. Raises :class:`DataError` for
    other shapes, for sides that do not begin with the prompt and for sides without an answer.
    """
    prompt, chosen, rejected = (_checked(part, where) for part in _parts(record, where))
    shared = len(prompt) or _num_shared(chosen, rejected)
    tools = tools_of(record, where)
    found = []
    for name, side in zip(SIDES, (chosen, rejected), strict=True):
        messages = side if not prompt or _is_whole(side) else [*prompt, *side]
        if messages[: len(prompt)] != prompt:
            raise DataError(
                f"{where} has a prompt, and {name} is a conversation that does not begin with it; "
                "take the prompt out, or give the answer alone."
            )
        found.append(_conversation(messages, shared, tools, f"{where}: {name}"))
    return Pair(*found)


def _parts(record: Any, where: str) -> tuple[list[Any], list[Any], list[Any]]:
    """Return the messages of prompt, chosen and rejected."""
    values = record if isinstance(record, dict) else {}
    prompt = messages_of_side(values.get("prompt"), "user")
    chosen, rejected = (messages_of_side(values.get(name), "assistant") for name in SIDES)
    if any(isinstance(values.get(name), str) for name in SIDES) and not prompt:
        raise DataError(
            f"{where} has an answer as text, but no prompt; give the prompt, or whole "
            "conversations as messages."
        )
    messages = [*prompt, *chosen, *rejected]
    if not chosen or not rejected or not all(isinstance(one, dict) for one in messages):
        raise DataError(f"{where} is not a pair; use {SHAPES}.")
    return prompt, chosen, rejected


def _checked(messages: list[Any], where: str) -> list[Message]:
    return [checked_message(message, where) for message in messages]


def _is_whole(messages: list[Message]) -> bool:
    """Say whether messages are a conversation with its prompt."""
    return bool(messages[0]["role"] != "assistant")


def _num_shared(chosen: list[Message], rejected: list[Message]) -> int:
    """Return how many messages both begin with, at least one of each left out."""
    most = min(len(chosen), len(rejected)) - 1
    return next((i for i in range(most) if chosen[i] != rejected[i]), most)


def _conversation(
    messages: list[Message], shared: int, tools: list[dict[str, Any]] | None, where: str
) -> Conversation:
    """Return a side; the assistant's messages after the first ``shared`` ones are compared."""
    is_compared = [
        index >= shared and message["role"] == "assistant" and message.get("weight") != 0
        for index, message in enumerate(messages)
    ]
    if not any(is_compared):
        raise DataError(
            f"{where} has no assistant message after the prompt, or all of weight 0; give an "
            "answer, or take the pair out."
        )
    plain = [{key: m[key] for key in m if key != "weight"} for m in messages]
    return Conversation(plain, is_compared, tools)
