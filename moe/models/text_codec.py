"""What a language model needs of a tokenizer."""

from typing import Any, Protocol


class TextCodec(Protocol):
    """Text to ids and back."""

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of transformers."""
        ...

    def encode(self, text: str) -> list[int]:
        """Return the ids of a prompt."""
        ...

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids."""
        ...
