"""The ``data`` section of runs on preference pairs."""

from typing import ClassVar, Literal

from pydantic import Field

from .text import TextsConfig


class PreferenceConfig(TextsConfig):
    """Pairs of answers, of which one is preferred: JSON objects with ``prompt``, ``chosen`` and
    ``rejected``."""

    loss_unit: ClassVar[str] = "nats per pair"
    measures: ClassVar[dict[str, str]] = {
        "eval_accuracy": "Share of held-out pairs that are ranked right",
        "eval_margin": "Mean margin of held-out pairs",
        "eval_chosen_reward": "Mean reward of the chosen answers of held-out pairs",
        "eval_rejected_reward": "Mean reward of the rejected answers of held-out pairs",
    }
    batch_is: ClassVar[str] = "{batch} pairs of answers of up to {length} tokens"

    format: Literal["preference"] = "preference"
    """Each pair has an answer that was chosen and one that was rejected."""
    beta: float = Field(default=0.1, gt=0)
    """How strongly a pair's margin counts: a small value lets the model move far from the one that
    it started as."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """The share of pairs that may be the wrong way round."""
