"""The ``data`` section of runs that learn to recommend sessions."""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from ..section import Section
from .data_section import AnyDataConfig


class AlignmentConfig(Section):
    """Preferences between generated sessions that a run learns too (docs/recommendation.md)."""

    pairs: str
    """A file that ``moeyard align`` wrote: a better and a worse session for some training rows."""
    weight: float = Field(default=0.1, ge=0)
    """Weight of the preference loss of a row against the cross-entropy of its session, a sum over
    codes. With 0 the run is one without this section, bit for bit."""
    beta: float = Field(default=0.1, gt=0)
    """How far log-probabilities may leave those of the model that generated the sessions: the
    factor of the margin in DPO's loss."""


class SessionsConfig(AnyDataConfig):
    """Sessions of watched items, in a log, and the semantic ids of the items."""

    loss_unit: ClassVar[str] = "nats per code"
    measures: ClassVar[dict[str, str]] = {
        "eval_recall": "Share of the items of held-out sessions that were recommended",
    }
    batch_is: ClassVar[str] = "{batch} sessions after histories of up to {length} tokens"

    format: Literal["sessions"] = "sessions"
    """Trains an encoder-decoder to generate the next session from a user's history."""
    source: str
    """A log of events, ``.csv`` or ``.parquet``, with the columns ``user``, ``session``, ``item``,
    ``watch_s`` and ``liked``; the events of a user are in order of time."""
    items: str
    """A folder of ``moeyard items``, with the semantic id of each item."""
    session_items: int = Field(default=5, ge=1, le=1024)
    """Items of a session to generate: the first ones of a session of the log that has as many."""
    session_watch_s: float = Field(default=0.0, ge=0)
    """Least watch time in seconds of a session to learn; it must have a like too."""
    positive_watch_s: float = Field(default=0.0, ge=0)
    """An item is in a user's history if it was watched for so many seconds, or liked."""
    min_history: int = Field(default=5, ge=1)
    """Fewest items of history before a session to learn."""
    recall_at: int = Field(default=10, ge=1)
    """Recall counts the items of the held-out session among so many recommended ones."""
    beams: int = Field(default=8, ge=1, le=4096)
    """Sessions that the beam search of an evaluation follows."""
    alignment: AlignmentConfig | None = None
    """None = cross-entropy alone."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.recall_at > self.beams * self.session_items:
            raise ValueError(
                f"recall_at is {self.recall_at}, but {self.beams} beams with {self.session_items} "
                "items each have fewer; lower it or raise beams."
            )
        return self
