"""An encoder-decoder that reads texts and writes texts."""

from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from ...errors import ConfigError
from .describe import describe
from .encoder_decoder import EncoderDecoder
from .target_generation import TargetLimits, write_targets


class SourceCodec(Protocol):
    """Texts to ids and back."""

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of transformers."""
        ...

    def encode_sources(self, texts: Sequence[str], length: int) -> list[tuple[list[int], bool]]:
        """Return the ids of each text, at most ``length``, and whether the text was cut."""
        ...

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids."""
        ...


class WrittenText(NamedTuple):
    """What the model wrote for a text."""

    text: str
    score: float
    """Its log-probability in nats, over ``length ** length_penalty``."""
    is_ended: bool
    """False if ``max_new_tokens`` ended it."""
    is_cut: bool
    """Whether the model read the beginning of the source only."""


class TextWriter:
    """An encoder-decoder that :func:`moeyard.load_seq2seq` opened. Call it with texts.

    ``config`` has its shape, ``model`` is the torch module.
    """

    def __init__(self, model: EncoderDecoder, codec: SourceCodec, eos_ids: Collection[int]) -> None:
        self.model = model.eval()
        self.config = model.config
        self.eos_ids = frozenset(eos_ids)
        """Ids that end a text."""
        self._codec = codec

    def __repr__(self) -> str:
        """Show layers, widths, experts, parameters, type, device and the share on disk."""
        return f"TextWriter({describe(self.model)}\n)"

    @property
    def tokenizer(self) -> Any:
        """transformers' tokenizer of the model's folder, opened when it is first used."""
        return self._codec.tokenizer

    def __call__(
        self,
        texts: Sequence[str],
        max_new_tokens: int | None = None,
        beams: int = 1,
        length_penalty: float = 1.0,
        length: int | None = None,
        batch_texts: int = 16,
    ) -> list[WrittenText]:
        """Return what the model writes for each text: the best of ``beams``.

        A text longer than ``length`` tokens is cut at its end. ``length`` and ``max_new_tokens``
        None are the model's most. Raises :class:`ConfigError` for empty texts and for numbers that
        the model does not have.
        """
        if isinstance(texts, str):
            raise ConfigError("texts is one text; give a list of texts.")
        if batch_texts < 1:
            raise ConfigError(f"batch_texts is {batch_texts}; use a number from 1 upwards.")
        longest = self.config.max_positions
        if length is not None and not 2 <= length <= longest:
            raise ConfigError(f"length is {length}; use a number from 2 to {longest}.")
        most = longest if max_new_tokens is None else max_new_tokens
        limits = TargetLimits(most, beams, length_penalty, self.eos_ids)
        for number, text in enumerate(texts):
            if not isinstance(text, str) or not text.strip():
                raise ConfigError(f"text {number} is {text!r}; give text that is not empty.")
        return [
            written
            for start in range(0, len(texts), batch_texts)
            for written in self._write(texts[start : start + batch_texts], length, limits)
        ]

    def _write(
        self, texts: Sequence[str], length: int | None, limits: TargetLimits
    ) -> Iterator[WrittenText]:
        encoded = self._codec.encode_sources(texts, length or self.config.max_positions)
        found = write_targets(self.model, [ids for ids, _ in encoded], limits)
        for (_, is_cut), written in zip(encoded, found, strict=True):
            best = written[0]
            yield WrittenText(self._codec.decode(best.ids), best.score, best.is_ended, is_cut)
