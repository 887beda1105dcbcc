"""The text side of a loaded model: its folder's tokenizer, opened when it is first needed."""

from functools import cached_property
from pathlib import Path
from typing import Any

from ...errors import ConfigError, ModelFileError
from .tokenizer_errors import library_errors
from .tokenizer_folder import open_folder_tokenizer


class TextCodec:
    """Text to ids and back, as a model reads and writes them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @cached_property
    def tokenizer(self) -> Any:
        """transformers' tokenizer; raises :class:`ModelFileError` if the folder has none."""
        return open_folder_tokenizer(self._folder)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a prompt."""
        tokenizer = self.tokenizer
        with library_errors(self._cannot_read):
            return prompt_ids(tokenizer, text)

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids, without special tokens."""
        tokenizer = self.tokenizer
        with library_errors(self._cannot_spell):
            return str(tokenizer.decode(ids, skip_special_tokens=True))

    def _cannot_read(self, reason: str) -> ConfigError:
        return ConfigError(
            f"the tokenizer of {self._folder} fails on this text ({reason}); change it."
        )

    def _cannot_spell(self, reason: str) -> ModelFileError:
        return ModelFileError(
            f"the tokenizer of {self._folder} cannot decode the answer ({reason}); copy it again."
        )


def prompt_ids(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of a prompt. It goes on, so no end of text is put behind it."""
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    while ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token):
        ids.pop()  # some tokenizers end every text
    return ids
