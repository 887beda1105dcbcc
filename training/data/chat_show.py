"""Conversations as a run reads them, with the tokens that it trains on marked."""

from collections.abc import Iterator
from itertools import groupby, islice

from ..config import DataConfig
from .chat import open_chat
from .chat_records import Conversations
from .tokenizer import open_tokenizer

GREEN, PLAIN = "\x1b[32m", "\x1b[0m"


def show_conversations(config: DataConfig, count: int, in_colour: bool) -> Iterator[str]:
    """Yield the first ``count`` conversations of ``data.source`` as text, special tokens included.

    What is trained on is green ``in_colour``, and in ``[[ ]]`` otherwise.
    """
    tokenizer = open_tokenizer(config.tokenizer)
    encoder = open_chat(config, tokenizer)
    decode = tokenizer.transformers().decode
    before, after = (GREEN, PLAIN) if in_colour else ("[[", "]]")
    for where, messages in islice(Conversations(config.source, "data.source"), count):
        encoded = encoder.encode(where, messages)
        text = ""
        pairs = zip(encoded.ids, encoded.is_answer, strict=True)
        for is_answer, run in groupby(pairs, key=lambda pair: pair[1]):
            part = decode([token for token, _ in run], skip_special_tokens=False)
            text += f"{before}{part}{after}" if is_answer else part
        trained = sum(encoded.is_answer)
        yield f"== {where}: {len(encoded.ids)} tokens, {trained} trained on\n{text}\n"
