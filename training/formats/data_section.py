"""What the ``data`` sections of all kinds have in common."""

from ..section import Section


class AnyDataConfig(Section):
    """What a run trains on."""

    format: str
    """What the data are; a subclass says which there are."""

    @property
    def has_whole_windows(self) -> bool:
        """Whether each row of the global batch has exactly ``train.sequence_length`` tokens."""
        return False
