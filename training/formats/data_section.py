"""What the ``data`` sections of all kinds have in common."""

from collections.abc import Mapping
from typing import ClassVar

from ..section import Section


class AnyDataConfig(Section):
    """What a run trains on, and the words in which reports and metrics speak of it."""

    loss_unit: ClassVar[str] = "nats per token"
    """What the loss is measured in."""
    measures: ClassVar[Mapping[str, str]] = {}
    """What evaluations measure besides the loss: the name in records, and what it is."""
    batch_is: ClassVar[str] = "{batch} x {length} tokens"
    """A global batch; ``batch`` is ``train.batch_sequences``, ``length`` ``sequence_length``."""

    format: str
    """What the data are; a subclass says which there are."""

    @property
    def has_whole_windows(self) -> bool:
        """Whether each row of the global batch has exactly ``train.sequence_length`` tokens."""
        return False
