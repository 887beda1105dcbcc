"""The ``data`` section of runs on preference pairs."""

from typing import Literal

from pydantic import Field

from .text import TextsConfig


class PreferenceConfig(TextsConfig):
    """Pairs of answers, of which one is preferred: JSON objects with ``prompt``, ``chosen`` and
    ``rejected``."""

    format: Literal["preference"] = "preference"
    """Each pair has an answer that was chosen and one that was rejected."""
    beta: float = Field(default=0.1, gt=0)
    """How strongly a pair's margin counts: a small value lets the model move far from the one that
    it started as."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """The share of pairs that may be the wrong way round."""
