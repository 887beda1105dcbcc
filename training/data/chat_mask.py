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

from ...chat_templates.chat_template import content_format_of
from ...chat_templates.renderer import Chat, Rendered, TemplateFault, TemplateProcess
from ...errors import DataError, MoeyardError
from .chat_records import Conversation, Message
from .tokenizer import Tokenizer

GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
STAND_IN = "\ue000\ue001"
"""Private characters, one at each end, which no text has."""
CHATS_A_JOB = 8
"""Most chats of a job. A usual conversation fits into one. A long one with many answers needs a
copy of itself for each, and several jobs keep the process's memory small."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A conversation as ids."""

    ids: list[int]
    is_answer: list[bool]
    """For each id, whether the assistant says it and is to learn it."""


class ChatEncoder:
    """Applies a chat template and finds the answers."""

    def __init__(
        self, tokenizer: Tokenizer, template: Path | None, process: TemplateProcess
    ) -> None:
        """``template`` is a Jinja file, None takes the tokenizer's own; ``process`` renders it."""
        self._inner = tokenizer.transformers()
        self._process = process
        self.template = _template_of(self._inner, template)
        self._format = content_format_of(self.template)
        self._marks_answers = GENERATION.search(self.template) is not None
        if not self._inner.is_fast:
            raise DataError(
                "data.tokenizer is a slow tokenizer, which cannot say where its tokens stand in "
                "the text; use a folder with tokenizer.json."
            )

    def encode(self, where: str, conversation: Conversation) -> Encoded:
        """Return ids and mask; ``where`` names the conversation in errors.

        Raises :class:`DataError` for messages that the template refuses, and for answers that
        cannot be told from the rest.
        """
        if conversation.tools and "tools" not in self.template:
            raise DataError(
                f"{where} has tools, which the chat template does not write; take them out, or "
                "give another data.chat_template."
            )
        if self._marks_answers:
            text, spans = self._marked(where, conversation)
        else:
            text, spans = self._told_apart(where, conversation)
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

    def _marked(self, where: str, conversation: Conversation) -> tuple[str, list[tuple[int, int]]]:
        """Return the text, and where in it the template marks answers to train on."""
        messages, is_trained, tools = conversation
        (found,) = self._render(where, [self._chat(messages, tools)])
        answers = [index for index, m in enumerate(messages) if m["role"] == "assistant"]
        if all(is_trained[index] for index in answers):
            return found.text, found.answers
        if len(found.answers) != len(answers):
            raise DataError(
                f"{where} has an answer of weight 0, but the chat template marks "
                f"{len(found.answers)} parts of {len(answers)} answers, so it is not known which "
                "that is; take the conversation or the weights out."
            )
        spans = zip(answers, found.answers, strict=True)
        return found.text, [span for index, span in spans if is_trained[index]]

    def _told_apart(
        self, where: str, conversation: Conversation
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return the text, and where in it the answers to train on are."""
        messages, is_trained, tools = conversation
        answers = [index for index, trained in enumerate(is_trained) if trained]
        if any(messages[i].get("tool_calls") or not messages[i]["content"] for i in answers):
            raise DataError(
                f"{where} has an answer with tool calls or without text, which can be found only "
                "if the chat template marks answers by {% generation %}; add the tags."
            )
        chats = [self._chat(messages, tools)]
        for index in answers:
            stand_in = messages[index] | {"content": STAND_IN}
            other = [*messages[:index], stand_in, *messages[index + 1 :]]
            chats.append(self._chat(other, tools))
            chats.append(self._chat(messages[:index], tools, add_generation_prompt=True))
        text, *texts = (found.text for found in self._render(where, chats))
        spans = []
        for other_text, prompt in zip(texts[::2], texts[1::2], strict=True):
            first, last = self._difference(where, text, other_text)
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

    def _chat(
        self,
        messages: list[Message],
        tools: list[dict[str, Any]] | None,
        add_generation_prompt: bool = False,
    ) -> Chat:
        worded = [self._format.word(m) if "content" in m else m for m in messages]
        return Chat(worded, tools, add_generation_prompt)

    def _render(self, where: str, chats: list[Chat]) -> list[Rendered]:
        tokens = dict(self._inner.special_tokens_map)
        found: list[Rendered] = []
        try:
            for start in range(0, len(chats), CHATS_A_JOB):
                part = chats[start : start + CHATS_A_JOB]
                found += self._process.render_all(
                    self.template, part, tokens, has_tags=self._marks_answers
                )
        except TemplateFault as fault:
            raise _refused(where, fault) from None
        return found


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
            "the tokenizer has no chat template, which conversations are written by; give one as "
            "data.chat_template, such as configs/train/chat.jinja."
        ) from None


def _refused(where: str, fault: TemplateFault) -> MoeyardError:
    if fault.kind == "unavailable":
        return MoeyardError(f"{fault}; start again.")
    if fault.kind == "syntax":
        return DataError(
            f"{where}: the chat template is not Jinja ({fault}); correct data.chat_template."
        )
    verb = "refuses" if fault.kind == "refusal" else "fails on"
    return DataError(
        f"{where}: the chat template {verb} these messages ({fault}); correct the conversation, or "
        "give another data.chat_template."
    )
