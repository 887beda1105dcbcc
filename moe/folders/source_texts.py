"""The text side of an encoder-decoder: sources to ids with their end, and ids to texts."""

from collections.abc import Sequence
from pathlib import Path

from ...errors import ModelFileError
from .text_codec import TextCodec
from .text_marks import end_of_text
from .tokenizer_errors import library_errors


class SourceTexts(TextCodec):
    """Texts as in training: a source has the id that ends a text behind it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._path = folder

    @property
    def end_id(self) -> int:
        """The id that ends a text; raises :class:`ModelFileError` for a tokenizer without one."""
        end = end_of_text(self._plain or self.tokenizer)
        if end is None:
            raise ModelFileError(
                f"{self._path} has a tokenizer without eos_token, which ends each source; set one "
                "in tokenizer_config.json."
            )
        return end

    def encode_sources(self, texts: Sequence[str], length: int) -> list[tuple[list[int], bool]]:
        """Return the ids of each text, at most ``length``, and whether the text was cut."""
        plain, end = self._plain, self.end_id
        with library_errors(self._cannot_read):
            if plain is not None:
                found = plain.encode_bare(list(texts))
            else:
                all_of = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)
                found = all_of["input_ids"]
        return [([*ids[: length - 1], end], len(ids) >= length) for ids in found]
