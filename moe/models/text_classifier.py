"""An encoder that gives texts their labels.

B texts, C labels.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ...errors import ConfigError
from ...kernels.values.memory import to_device
from .describe import describe
from .documents import batch_of_lengths
from .encoder import Encoder


class WholeTextCodec(Protocol):
    """Texts to ids."""

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of transformers."""
        ...

    def encode(self, texts: Sequence[str], length: int) -> list[tuple[list[int], bool]]:
        """Return the ids of each text, at most ``length``, and whether the text was cut."""
        ...


class Classified(NamedTuple):
    """What a text is."""

    label: str
    """The likeliest label."""
    probabilities: dict[str, float]
    """Of all labels, in the model's order."""
    is_cut: bool
    """Whether the model read the beginning of the text only."""


class TextClassifier:
    """An encoder that :func:`moeyard.load_classifier` opened. Call it with texts.

    ``config`` has its shape, ``encoder`` is the torch module.
    """

    def __init__(self, encoder: Encoder, codec: WholeTextCodec) -> None:
        if not encoder.config.labels:
            raise ConfigError(
                "the model has no head for labels, so it cannot classify; train one with "
                "data.format classify and start_from this folder."
            )
        self.encoder = encoder.eval()
        self.config = encoder.config
        self._codec = codec

    def __repr__(self) -> str:
        """Show layers, widths, experts, parameters, type, device and the share on disk."""
        labels = f"\n  labels: {len(self.labels)}, {brief(self.labels)}"
        return f"TextClassifier({describe(self.encoder)}{labels}\n)"

    @property
    def labels(self) -> tuple[str, ...]:
        """What a text may be."""
        return self.config.labels

    @property
    def tokenizer(self) -> Any:
        """transformers' tokenizer of the model's folder, opened when it is first used."""
        return self._codec.tokenizer

    def __call__(
        self, texts: Sequence[str], length: int | None = None, batch_texts: int = 32
    ) -> list[Classified]:
        """Return what each text is.

        A text longer than ``length`` tokens is cut at its end; None = the model's most. Raises
        :class:`ConfigError` for empty texts, and for a length that the model does not have.
        """
        if isinstance(texts, str):
            raise ConfigError("texts is one text; give a list of texts.")
        if batch_texts < 1:
            raise ConfigError(f"batch_texts is {batch_texts}; use a number from 1 upwards.")
        return [
            found
            for start in range(0, len(texts), batch_texts)
            for found in self._classify(texts[start : start + batch_texts], start, length)
        ]

    @torch.inference_mode()
    def probabilities(self, ids_B: Sequence[Sequence[int]]) -> Tensor:
        """Return the probability of each label, fp32 ``[B, C]``, for texts given as ids."""
        device = self.encoder.device
        lengths_B = np.array([len(ids) for ids in ids_B], dtype=np.int64)
        ids_T = torch.tensor([one for ids in ids_B for one in ids], dtype=torch.int64)
        batch = batch_of_lengths(to_device(ids_T, device), lengths_B)
        logits_BC = self.encoder.logits(self.encoder(batch).hidden_TD, batch.lengths)
        return logits_BC.float().softmax(dim=1).cpu()

    def _classify(
        self, texts: Sequence[str], first: int, length: int | None
    ) -> Iterator[Classified]:
        longest = self.config.max_positions
        if length is not None and not 1 <= length <= longest:
            raise ConfigError(f"length is {length}; use a number from 1 to {longest}.")
        for number, text in enumerate(texts, start=first):
            if not isinstance(text, str) or not text.strip():
                raise ConfigError(f"text {number} is {text!r}; give text that is not empty.")
        encoded = self._codec.encode(texts, length or longest)
        shares_BC = self.probabilities([ids for ids, _ in encoded])
        for (_, is_cut), shares_C in zip(encoded, shares_BC.tolist(), strict=True):
            by_label = dict(zip(self.labels, shares_C, strict=True))
            yield Classified(max(by_label, key=by_label.__getitem__), by_label, is_cut)


def brief(labels: Sequence[str]) -> str:
    """Return a few labels in words."""
    return ", ".join(labels[:5]) + (", ..." if len(labels) > 5 else "")
