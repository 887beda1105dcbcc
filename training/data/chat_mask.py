"""Conversations to token ids, and which of them the assistant says.

A template may mark answers by ``{% generation %}``, as transformers has it. Without these tags, we
put other text in place of an answer, render again, and take what differs. An answer begins where
its prompt ends. The special token right behind it belongs to it: without this token a model would
not learn to stop.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import DataError
from .chat_records import Message
from .tokenizer import Tokenizer

GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
STAND_IN = "\ue000\ue001"
"""Private characters, one at each end, which no text has."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A conversation as ids."""

    ids: list[int]
    is_answer: list[bool]
    """For each id, whether the assistant says it."""


class ChatEncoder:
    """Applies a chat template and finds the answers."""

    def __init__(self, tokenizer: Tokenizer, template: Path | None) -> None:
        """``template`` is a Jinja file, None takes the tokenizer's own."""
        self._inner = tokenizer.transformers()
        self.template = _template_of(self._inner, template)
        self._marks_answers = GENERATION.search(self.template) is not None
        if not self._inner.is_fast:
            raise DataError(
                "data.tokenizer is a slow tokenizer, which cannot say where its tokens stand in "
                "the text; use a folder with tokenizer.json."
            )

    def encode(self, where: str, messages: list[Message]) -> Encoded:
        """Return ids and mask; ``where`` names the conversation in errors.

        Raises :class:`DataError` for messages that the template refuses, and for answers that
        cannot be told from the rest.
        """
        text, spans = self._rendered(where, messages)
        given = self._inner(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ids = given["input_ids"]
        starts = [start for start, _ in given["offset_mapping"]]
        is_answer = [False] * len(ids)
        for first, last in spans:
            begins = next((i for i, start in enumerate(starts) if start >= first), len(ids))
            # A token with the end of the prompt in it is not what the model will be asked for.
            # (Offsets hide that where they leave out a token's space.)
            before = self._inner(text[:first], add_special_tokens=False, verbose=False)
            begins += before["input_ids"] != ids[:begins]
            for index in range(begins, len(ids)):
                is_answer[index] = is_answer[index] or starts[index] < last
        if not any(is_answer):
            raise DataError(
                f"{where} has no answer in the rendered text; correct the conversation or the chat "
                "template."
            )
        return Encoded(ids, is_answer)

    def _rendered(self, where: str, messages: list[Message]) -> tuple[str, list[tuple[int, int]]]:
        """Return the conversation's text, and where in it the answers begin and end."""
        if self._marks_answers:
            return self._render_marked(where, messages)
        answers = [
            index for index, message in enumerate(messages) if message["role"] == "assistant"
        ]
        if any(
            messages[index].get("tool_calls") or not messages[index]["content"] for index in answers
        ):
            raise DataError(
                f"{where} has an answer with tool calls or without text, which can be found only "
                "if the chat template marks answers by {% generation %}; add the tags."
            )
        text = self._render(where, messages)
        spans = []
        for index in answers:
            message = messages[index]
            other = [*messages[:index], message | {"content": STAND_IN}, *messages[index + 1 :]]
            first, last = self._difference(where, text, self._render(where, other))
            prompt = self._render(where, messages[:index], add_generation_prompt=True)
            if text.startswith(prompt) and len(prompt) <= first:
                first = len(prompt)
            spans.append((first, last))
        return text, spans

    def _difference(self, where: str, text: str, other: str) -> tuple[int, int]:
        """Return the span of ``text`` where ``other`` has ``STAND_IN``, with the token behind."""
        first = _num_shared(text, other)
        behind = _num_shared(text[first:][::-1], other[first:][::-1])
        last = len(text) - behind
        is_found = other[first : len(other) - behind] == STAND_IN and first < last
        last += len(text[last:]) - len(text[last:].lstrip())  # some put a newline in between
        closing = next((t for t in self._closing_tokens if text.startswith(t, last)), None)
        if not is_found or closing is None:
            raise DataError(
                f"{where}: the chat template does not show where an answer begins and ends in a "
                "special token; mark answers in it by {% generation %} and {% endgeneration %}."
            )
        return first, last + len(closing)

    @property
    def _closing_tokens(self) -> list[str]:
        found = {str(token) for token in self._inner.added_tokens_decoder.values()}
        return sorted(found, key=len, reverse=True)

    def _render(self, where: str, messages: list[Message], **options: Any) -> str:
        try:
            return str(
                self._inner.apply_chat_template(
                    messages, chat_template=self.template, tokenize=False, **options
                )
            )
        except Exception as error:  # a template can raise anything
            raise _refused(where, error) from None

    def _render_marked(
        self, where: str, messages: list[Message]
    ) -> tuple[str, list[tuple[int, int]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = render_jinja_template(
                conversations=[messages],
                chat_template=self.template,
                return_assistant_tokens_mask=True,
                **self._inner.special_tokens_map,
            )
        except Exception as error:  # a template can raise anything
            raise _refused(where, error) from None
        return texts[0], spans[0]


def _num_shared(one: str, two: str) -> int:
    """Return how many characters two texts begin with alike."""
    pairs = enumerate(zip(one, two, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(two)))


def _template_of(inner: Any, path: Path | None) -> str:
    if path is not None:
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            raise DataError(
                f"data.chat_template is {str(path)!r}, which cannot be read ({reason}); give a "
                "Jinja file."
            ) from None
    try:
        return str(inner.get_chat_template())
    except ValueError:  # none, or several and none of them the default
        raise DataError(
            "data.format is chat, but the tokenizer has no chat template; give one as "
            "data.chat_template, such as configs/train/chat.jinja."
        ) from None


def _refused(where: str, error: Exception) -> DataError:
    reason = " ".join(str(error).split())
    return DataError(
        f"{where}: the chat template refuses these messages ({reason}); correct the conversation, "
        "or give another data.chat_template."
    )
