"""Text to token ids: bytes, or any Hugging Face tokenizer folder."""

import hashlib
import json
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RustTokenizer

from ...errors import ConfigError, DataError, ModelFileError
from ...moe.folders.hub import local_folder
from ...moe.folders.text_marks import TextMarks, end_of_text, marks_of
from ...moe.folders.tokenizer_errors import library_errors
from ...moe.folders.tokenizer_folder import copy_tokenizer, has_tokenizer, open_folder_tokenizer

END_OF_TEXT = "<|endoftext|>"
SAMPLE = "Two tokenizers that agree on this: naïve café, 12 x 345 = 4140, {'a': [1.5]}\n\t日本語 🙂"


class Tokenizer(Protocol):
    """What training needs of a tokenizer."""

    vocab_size: int
    eos_id: int
    sha256: str
    """Identifies the tokenizer; shards made with another one are refused."""
    marks: TextMarks
    """What an encoder reads around a text."""

    def encode(self, text: str) -> npt.NDArray[np.uint32]:
        """Return ids without special tokens."""
        ...

    def encode_batch(self, texts: list[str]) -> list[npt.NDArray[np.uint32]]:
        """Return the ids of several texts, each as :meth:`encode` would."""
        ...

    def save(self, folder: Path) -> None:
        """Write files that ``AutoTokenizer.from_pretrained(folder)`` reads."""
        ...

    def transformers(self) -> Any:
        """Return the tokenizer as transformers knows it."""
        ...


class ByteTokenizer:
    """UTF-8 bytes are ids 0 to 255; 256 ends a document."""

    vocab_size = 257
    eos_id = 256
    sha256 = hashlib.sha256(b"moeyard-bytes-1").hexdigest()
    marks = TextMarks((eos_id,), ())

    def encode(self, text: str) -> npt.NDArray[np.uint32]:
        """Return one id per UTF-8 byte."""
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32)

    def encode_batch(self, texts: list[str]) -> list[npt.NDArray[np.uint32]]:
        """Return the ids of several texts."""
        return [self.encode(text) for text in texts]

    def save(self, folder: Path) -> None:
        """Write the same mapping as a byte-level BPE without merges."""
        write_tokenizer_files(self._rust(), folder)

    def transformers(self) -> Any:
        """Return the same mapping as transformers knows it."""
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast(
            tokenizer_object=self._rust(), eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
        )

    def _rust(self) -> RustTokenizer:
        vocabulary = {symbol: byte for byte, symbol in enumerate(_byte_symbols())}
        vocabulary[END_OF_TEXT] = self.eos_id
        rust = RustTokenizer(models.BPE(vocab=vocabulary, merges=[]))
        rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        rust.decoder = decoders.ByteLevel()
        rust.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
        return rust


class FolderTokenizer:
    """A Hugging Face tokenizer folder."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise DataError(
                f"data.tokenizer is {str(folder)!r}, which is not a folder; "
                "give 'bytes', a folder with tokenizer.json, or OWNER/MODEL of the hub."
            )
        if not has_tokenizer(folder):
            raise DataError(
                f"data.tokenizer is {str(folder)!r}, which has no tokenizer; put tokenizer.json "
                "there, or set data.tokenizer to 'bytes' or another folder."
            )
        self._folder = folder
        try:
            self._inner = open_folder_tokenizer(folder)
        except ModelFileError as error:
            raise DataError(f"data.tokenizer cannot be opened: {error}") from error
        end = end_of_text(self._inner)
        if end is None:
            raise DataError(
                f"data.tokenizer {str(folder)!r} has no eos_token, which separates documents; "
                "set eos_token in tokenizer_config.json."
            )
        vocabulary = self._inner.get_vocab()
        self.vocab_size = max(vocabulary.values()) + 1
        self.eos_id: int = end
        self.marks = marks_of(self._inner)
        rust = getattr(self._inner, "backend_tokenizer", None)
        identity = json.dumps(vocabulary, sort_keys=True) if rust is None else rust.to_str()
        self.sha256 = hashlib.sha256(f"{self.eos_id} {identity}".encode()).hexdigest()

    def encode(self, text: str) -> npt.NDArray[np.uint32]:
        """Return ids without special tokens."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[npt.NDArray[np.uint32]]:
        """Return the ids of several texts; the tokenizers library uses all cores."""
        with library_errors(self._fails):
            ids = self._inner(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return [np.asarray(one, dtype=np.uint32) for one in ids]

    def save(self, folder: Path) -> None:
        """Copy the tokenizer's files; write new ones if the copies open as another tokenizer."""
        copy_tokenizer(self._folder, folder)
        try:
            is_same = FolderTokenizer(folder).sha256 == self.sha256
        except DataError:
            is_same = False
        if not is_same:  # the old folder's config.json decided how to open them
            self._inner.save_pretrained(folder)

    def transformers(self) -> Any:
        """Return the tokenizer as transformers opened it."""
        return self._inner

    def _fails(self, reason: str) -> DataError:
        return DataError(
            f"data.tokenizer {str(self._folder)!r} fails on a text ({reason}); "
            "take the text out, or use another tokenizer."
        )


def open_tokenizer(name: str) -> Tokenizer:
    """Open ``bytes``, a tokenizer folder, or that of a model on the hub."""
    if name == "bytes":
        return ByteTokenizer()
    try:
        folder = local_folder(name, weights=False)
    except ModelFileError as error:
        raise DataError(f"data.tokenizer is {name!r}, which cannot be used: {error}") from None
    return FolderTokenizer(folder)


def write_tokenizer_files(rust: RustTokenizer, folder: Path) -> None:
    """Write a tokenizer that ends documents with ``END_OF_TEXT`` as a Hugging Face folder."""
    rust.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    text = json.dumps(settings, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def _byte_symbols() -> list[str]:
    """Return GPT-2's printable stand-in for every byte, in byte order.

    Printable bytes stand for themselves; the others take code points from 256 upwards in order.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = {byte: chr(byte) for byte in printable}
    others = (byte for byte in range(256) if byte not in symbols)
    symbols.update({byte: chr(256 + index) for index, byte in enumerate(others)})
    return [symbols[byte] for byte in range(256)]


def check_tokenizer(start_from: str, name: str, tokenizer: Tokenizer) -> None:
    """Raise :class:`ConfigError` if ``data.tokenizer`` has other ids than the folder's own.

    If the folder's own cannot be opened, another folder is trusted to hold the same tokenizer.
    """
    if name == start_from or not has_tokenizer(local_folder(start_from)):
        return
    try:
        own = open_tokenizer(start_from)
    except DataError:
        if name == "bytes":
            raise
        return
    is_same = own.eos_id == tokenizer.eos_id
    if not is_same or own.encode(SAMPLE).tolist() != tokenizer.encode(SAMPLE).tolist():
        raise ConfigError(
            f"data.tokenizer is {name!r}, whose ids mean other text than those of start_from "
            f"{start_from!r}; set data.tokenizer to null to take the folder's."
        )
