"""Whether a chat template writes calls of tools and their results, and how it wants them.

Many templates leave calls out without a word, so that the model reads another conversation than the
one that was sent. Others take one form of a message alone. Which it is shows when short
conversations are rendered and their words are looked for.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count, product
from typing import Any, Literal

from .renderer import TemplateFault

Feature = Literal["calls", "results", "several", "text"]
Message = dict[str, Any]
EMPTY: tuple[Literal[""], None] = ("", None)
Render = Callable[[list[Message]], str]


@dataclass(frozen=True, slots=True)
class ToolForm:
    """The form in which a template takes calls and their results."""

    has_objects: bool = True
    """Whether arguments are objects, as in vLLM, or the text that the caller wrote."""
    empty_content: Literal[""] | None = ""
    """What a message with calls has for no text."""
    has_short_ids: bool = False
    """Whether ids are numbered anew: some templates demand nine letters or digits."""

    def word(self, messages: list[Message]) -> list[Message]:
        """Return messages as the template takes them.

        Given are arguments as the text of JSON objects, "" as the content of calls without text,
        and the results of earlier calls only.
        """
        ids: dict[str, str] = {}
        numbers = count()
        worded = []
        for message in messages:
            if message["role"] == "tool":
                message = {**message, "tool_call_id": ids[message["tool_call_id"]]}
            if "tool_calls" in message:
                for call in message["tool_calls"]:
                    new = f"call{next(numbers):05}" if self.has_short_ids else call["id"]
                    ids[call["id"]] = new
                calls = [self._word_call(call, ids[call["id"]]) for call in message["tool_calls"]]
                content = message["content"] or self.empty_content
                message = {**message, "content": content, "tool_calls": calls}
            worded.append(message)
        return worded

    def _word_call(self, call: Message, call_id: str) -> Message:
        function = call["function"]
        if self.has_objects:
            function = {**function, "arguments": json.loads(function["arguments"])}
        return {**call, "id": call_id, "function": function}


@dataclass(frozen=True, slots=True)
class ToolSupport:
    """What was found out about a template."""

    form: ToolForm
    lacks: dict[Feature, str]
    """What it does not write, each with the reason in a few words."""


def tool_support(render: Render) -> ToolSupport:
    """Find the form in which a template writes the most; ``render`` raises ``TemplateFault``."""
    best = None
    for has_short_ids, empty_content, has_objects in product((False, True), EMPTY, (True, False)):
        form = ToolForm(has_objects, empty_content, has_short_ids)
        try:
            lacks = _lacks(render, form)
        except TemplateFault as fault:  # the process has ended, as it would for every form
            return best or ToolSupport(form, dict.fromkeys(PROBES, f"it fails: {fault}"))
        if best is None or len(lacks) < len(best.lacks):
            best = ToolSupport(form, lacks)
        if not best.lacks:
            break
    assert best is not None, "there are variants"
    return best


def _lacks(render: Render, form: ToolForm) -> dict[Feature, str]:
    lacks: dict[Feature, str] = {}
    for feature, (messages, words) in PROBES.items():
        reason = _fault(render, form.word(messages), words)
        if reason is not None:
            lacks[feature] = reason
        elif feature == "results":
            lacks.pop("calls", None)  # a template may refuse a call that has no result yet
    return lacks


def _fault(render: Render, messages: list[Message], words: list[str]) -> str | None:
    """Say what is wrong with a rendered conversation, None for nothing."""
    try:
        text = render(messages)
    except TemplateFault as fault:
        if fault.kind in ("ended", "unavailable"):
            raise
        return f"it {'refuses' if fault.kind == 'refusal' else 'fails on'} them: {fault}"
    if any(str({"topic": word}) in text for word in words):
        return "it writes arguments as Python does, not as JSON"
    return None if all(word in text for word in words) else "it leaves them out"


def _call(number: int, function: str, argument: str) -> Message:
    name_and_arguments = {"name": function, "arguments": json.dumps({"topic": argument})}
    return {"id": f"call_{number:024}", "type": "function", "function": name_and_arguments}


def _calls(content: str, *calls: Message) -> Message:
    return {"role": "assistant", "content": content, "tool_calls": list(calls)}


def _result(number: int, content: str) -> Message:
    return {"role": "tool", "tool_call_id": f"call_{number:024}", "content": content}


_USER: Message = {"role": "user", "content": "hello"}
_FIRST, _SECOND = _call(1, "firstfunction", "firsttopic"), _call(2, "otherfunction", "othertopic")
_WORDS = ["firstfunction", "firsttopic"]
PROBES: dict[Feature, tuple[list[Message], list[str]]] = {
    "calls": ([_USER, _calls("", _FIRST)], _WORDS),
    "results": ([_USER, _calls("", _FIRST), _result(1, "firstresult")], [*_WORDS, "firstresult"]),
    "several": (
        [
            _USER,
            _calls("", _FIRST, _SECOND),
            _result(1, "firstresult"),
            _result(2, "otherresult"),
        ],
        [*_WORDS, "firstresult", "otherfunction", "othertopic", "otherresult"],
    ),
    "text": (
        [_USER, _calls("sometext", _FIRST), _result(1, "firstresult")],
        [*_WORDS, "sometext", "firstresult"],
    ),
}
"""Conversations, and the plain words that must come out."""
