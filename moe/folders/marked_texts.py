"""The text side of a loaded encoder: its folder's tokenizer, opened when it is first needed."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from .plain_tokenizer import PlainTokenizer, open_plain
from .text_marks import TextMarks, marks_of
from .tokenizer_errors import library_errors
from .tokenizer_folder import check_tokenizer_files, open_folder_tokenizer, unusable


class MarkedTexts:
    """Texts to ids with the marks around them, as in training."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @cached_property
    def tokenizer(self) -> Any:
        """transformers' tokenizer; raises :class:`ModelFileError` if the folder has none."""
        return open_folder_tokenizer(self._folder)

    @cached_property
    def _plain(self) -> PlainTokenizer | None:
        check_tokenizer_files(self._folder)
        with library_errors(lambda reason: unusable(self._folder, reason)):
            return open_plain(self._folder)

    @cached_property
    def _marks(self) -> TextMarks:
        return marks_of(self._plain or self.tokenizer)

    def encode(self, texts: Sequence[str], length: int) -> list[tuple[list[int], bool]]:
        """Return the ids of each text, at most ``length``, and whether the text was cut."""
        marks, plain = self._marks, self._plain
        with library_errors(self._cannot_read):
            if plain is not None:
                found = plain.encode_bare(list(texts))
            else:
                all_of = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)
                found = all_of["input_ids"]
        return [(marks.around(ids, length), marks.cuts(len(ids), length)) for ids in found]

    def _cannot_read(self, reason: str) -> ConfigError:
        return ConfigError(
            f"the tokenizer of {self._folder} fails on a text ({reason}); take the text out."
        )
