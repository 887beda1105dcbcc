"""What every run knows about its data, whatever its objective."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from .tokenizer import Tokenizer


class TrainingData(Protocol):
    """The training data of a run, read step by step."""

    def wait_for(self, step: int) -> None:
        """Wait, on all ranks alike, until the batch of ``step`` can be read."""
        ...

    def forget_before(self, step: int) -> None:
        """Drop what only steps before ``step`` need; even a restart will not ask for it."""
        ...

    def token_counts(self) -> list[int]:
        """Return how often each id occurs, in all of the data or in a sample; none without ids."""
        ...

    def close(self) -> None:
        """Close files and end threads."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """Data of a run; objectives return it from ``open_data`` with what else they need."""

    tokenizer: Tokenizer | None
    """None if rows are not tokens of texts."""
    train: TrainingData
    identity: str
    """Hash of the training data; a resumed run must have the same."""
    num_train_tokens: int | None
    """None for a stream."""
    held_out_identity: str
    chat_template: str | None = None
    """What the export writes; None keeps the tokenizer's own."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Small text files by name, which checkpoints carry and exports write."""
