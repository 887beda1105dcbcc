"""Train a byte-level BPE and keep it as a Hugging Face tokenizer folder."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from ..stop import StopRequest
from ..work import LongWork
from .documents import Document
from .tokenizer import END_OF_TEXT, write_tokenizer_files

SMALLEST = 257
"""Ids of a BPE without merges: 256 bytes and the end of a document."""
MOST_CHARACTERS = 1 << 30
"""Most characters to learn from: more text changes few merges, and its words fill the memory."""


def train_bpe(
    documents: Iterable[Document], vocab_size: int, folder: Path, stop: StopRequest
) -> None:
    """Learn ``vocab_size`` tokens from the beginning of ``documents`` and write ``folder``."""
    rust = RustTokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    with LongWork("learning tokens", stop) as work:
        rust.train_from_iterator(_pieces(documents, work), trainer)
    write_tokenizer_files(rust, folder)


def _pieces(documents: Iterable[Document], work: LongWork) -> Iterator[str]:
    characters = 0
    for number, document in enumerate(documents, start=1):
        for piece in document:
            characters += len(piece)
            yield piece
        work.advance(documents=number, characters=characters)
        if characters > MOST_CHARACTERS:
            return
