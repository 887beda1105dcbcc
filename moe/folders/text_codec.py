"""The text side of a loaded model: its folder's tokenizer, opened when it is first needed."""

from functools import cached_property
from pathlib import Path
from typing import Any

from ...errors import ConfigError, ModelFileError
from .plain_tokenizer import PlainTokenizer, open_plain
from .tokenizer_errors import library_errors
from .tokenizer_folder import check_tokenizer_files, open_folder_tokenizer, unusable


class TextCodec:
    """Text to ids and back, as a model reads and writes them."""

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

    def encode(self, text: str) -> list[int]:
        """Return the ids of a prompt."""
        plain = self._plain
        if plain is None:
            tokenizer = self.tokenizer
            with library_errors(self._cannot_read):
                return prompt_ids(tokenizer, text)
        with library_errors(self._cannot_read):
            return without_end(plain, plain.encode(text), text)

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids, without special tokens."""
        plain = self._plain
        if plain is None:
            tokenizer = self.tokenizer
            with library_errors(self._cannot_spell):
                return str(tokenizer.decode(ids, skip_special_tokens=True))
        with library_errors(self._cannot_spell):
            return plain.decode(ids)

    def _cannot_read(self, reason: str) -> ConfigError:
        return ConfigError(
            f"the tokenizer of {self._folder} fails on this text ({reason}); change it."
        )

    def _cannot_spell(self, reason: str) -> ModelFileError:
        return ModelFileError(
            f"the tokenizer of {self._folder} cannot decode the answer ({reason}); copy it again."
        )


def prompt_ids(tokenizer: Any, text: str) -> list[int]:
    """Return the ids that transformers' tokenizer gives a prompt."""
    return without_end(tokenizer, list(tokenizer(text, verbose=False)["input_ids"]), text)


def without_end(tokenizer: Any, ids: list[int], text: str) -> list[int]:
    """Return ids of a prompt without an end of text that is not in it, since the prompt goes on."""
    while ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token):
        ids.pop()  # some tokenizers end every text
    return ids
