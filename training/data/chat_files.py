"""Conversations, or groups of them, to the two files that a run reads."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from ...errors import DataError
from ..stop import StopRequest
from ..work import LongWork
from .chat_mask import ChatEncoder, Encoded
from .chat_windows import ChatWriter
from .corpus import make_folder
from .held_out import every_nth
from .origins import are_made_from, origin_of
from .tokenizer import Tokenizer


class ChatRecord(Protocol):
    """What a JSON object says: one conversation, or several."""

    def digest(self) -> bytes:
        """Return a hash that tells it from others."""
        ...


R = TypeVar("R", bound=ChatRecord)
R_co = TypeVar("R_co", bound=ChatRecord, covariant=True)


class ChatSource(Protocol[R_co]):
    """The records of a file, or of a folder."""

    def __iter__(self) -> Iterator[tuple[str, R_co]]:
        """Yield where each record stands, and the record."""
        ...

    def fingerprint(self) -> str | None:
        """Identify the files without reading them; None while one has just changed."""
        ...


class ChatOptions(Protocol):
    """What a configuration says of its conversations."""

    @property
    def source(self) -> str:
        """Where they are."""

    @property
    def eval_source(self) -> str | None:
        """Where those held out are; None = every n-th of the others."""

    @property
    def eval_fraction(self) -> float:
        """The share held out."""


def prepare_chats(
    config: ChatOptions,
    open_source: Callable[[str, str], ChatSource[R]],
    tokenizer: Tokenizer,
    encoder: ChatEncoder,
    conversations_of: Callable[[str, R], Sequence[Encoded]],
    paths: tuple[Path, Path],
    stop: StopRequest,
) -> None:
    """Write the training file and the held-out one, unless they were made from the same.

    ``open_source`` gets a path and the configuration key that says it. ``conversations_of`` encodes
    a record, which it gets with its place. Raises :class:`DataError` for records that cannot be
    trained on, :class:`Stopped` after a stop request.
    """
    make_folder(paths[0].parent)
    sources = [open_source(config.source, "data.source")]
    if config.eval_source is not None:
        sources.append(open_source(config.eval_source, "data.eval_source"))
    prints = [source.fingerprint() for source in sources]
    facts = [prints, tokenizer.sha256, encoder.template, config.eval_fraction]
    origin = origin_of(facts)
    if are_made_from(paths, origin, prints):
        return
    train, held_out = ChatWriter(), ChatWriter()
    with LongWork("tokenising", stop) as work:
        for is_held_out, where, record in _sides(config.eval_fraction, sources):
            writer = held_out if is_held_out else train
            for encoded in conversations_of(where, record):
                writer.add(encoded)
            work.advance(conversations=len(train) + len(held_out))
    for writer, name in ((train, "train on"), (held_out, "hold out")):
        if not len(writer):
            raise DataError(
                f"data.source is {config.source!r}, which leaves no conversation to {name}; give "
                "more of them, or data.eval_source."
            )
    train.write(paths[0], origin)
    held_out.write(paths[1], origin)


def _sides(eval_fraction: float, sources: Sequence[ChatSource[R]]) -> Iterator[tuple[bool, str, R]]:
    """Yield (is held out, where, record); copies of held-out records are left out."""
    every = every_nth(eval_fraction)
    held_out = set()
    has_own_eval = len(sources) > 1
    for index, (where, record) in enumerate(sources[-1]):
        if has_own_eval or index % every == 0:
            held_out.add(record.digest())
            yield True, where, record
    for where, record in sources[0]:
        if record.digest() not in held_out:
            yield False, where, record
