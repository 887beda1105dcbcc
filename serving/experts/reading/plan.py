"""What was decided about reading experts."""

from dataclasses import dataclass
from typing import Literal

Mode = Literal["buffered", "direct"]
"""Through the page cache, or around it."""
Reader = Literal["auto", "buffered", "direct"]
READERS: tuple[Reader, ...] = ("auto", "buffered", "direct")
MODE_TEXT: dict[Mode, str] = {
    "buffered": "through the page cache",
    "direct": "around the page cache",
}


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """How experts are read from the folder."""

    mode: Mode
    threads: int
    bytes_per_s: float
    """What these threads read together when the folder was opened."""
    reason: str
    """Why: the rest of a sentence."""

    @property
    def text(self) -> str:
        """One line for people."""
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return (
            f"Experts are read {MODE_TEXT[self.mode]} by {threads} at {rate(self.bytes_per_s)}: "
            f"{self.reason}."
        )


def rate(bytes_per_s: float) -> str:
    """Return a rate as people write it."""
    if bytes_per_s < 1e9:
        return f"{bytes_per_s / 1e6:.0f} MB/s"
    return f"{bytes_per_s / 1e9:.1f} GB/s"
