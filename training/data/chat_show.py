"""Conversations as a run reads them, with the tokens that it trains on marked."""

from collections.abc import Iterator
from itertools import groupby, islice
from unicodedata import category

from ...chat_templates.renderer import TemplateProcess
from ..formats.text import TextsConfig
from .chat import open_chat
from .chat_records import Conversation, Conversations
from .preference_records import SIDES, Pairs
from .tokenizer import open_tokenizer

GREEN, PLAIN = "\x1b[32m", "\x1b[0m"


def show_conversations(config: TextsConfig, count: int, in_colour: bool) -> Iterator[str]:
    """Yield the first ``count`` records of ``data.source`` as text, special tokens included.

    A record is a conversation, or a pair of two.

    What is trained on is green ``in_colour``, and in ``[[ ]]`` otherwise. Control characters
    except tabs and newlines are escaped, because a terminal would obey them.
    """
    tokenizer = open_tokenizer(config.tokenizer)
    decode = tokenizer.transformers().decode
    before, after = (GREEN, PLAIN) if in_colour else ("[[", "]]")
    with TemplateProcess() as process:
        encoder = open_chat(config, tokenizer, process)
        for where, chat in _first(config, count):
            encoded = encoder.encode(where, chat)
            text = ""
            pairs = zip(encoded.ids, encoded.is_answer, strict=True)
            for is_answer, run in groupby(pairs, key=lambda pair: pair[1]):
                part = _printable(decode([t for t, _ in run], skip_special_tokens=False))
                text += f"{before}{part}{after}" if is_answer else part
            trained = sum(encoded.is_answer)
            counts = f"{len(encoded.ids)} tokens, {trained} trained on"
            yield f"== {_printable(where)}: {counts}\n{text}\n"


def _first(config: TextsConfig, count: int) -> Iterator[tuple[str, Conversation]]:
    """Yield where each conversation of the first records stands, and what it says."""
    if config.format != "preference":
        yield from islice(Conversations(config.source, "data.source"), count)
        return
    for where, pair in islice(Pairs(config.source, "data.source"), count):
        for name, side in zip(SIDES, pair, strict=True):
            yield f"{where}: {name}", side


def _printable(text: str) -> str:
    """Return a text with its control characters as Python spells them."""
    return "".join(
        repr(sign)[1:-1] if category(sign) == "Cc" and sign not in "\t\n" else sign for sign in text
    )
