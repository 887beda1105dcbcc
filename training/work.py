"""Long work outside the training loop: shows its progress and ends on a stop request."""

from ..errors import Stopped
from ..parallel.watch.pulse import pulse
from ..progress import Progress
from .stop import StopRequest


class LongWork(Progress):
    """A :class:`Progress` that ends on a stop request.

    ``total`` is how often :meth:`advance` will be called, None if unknown.
    """

    def __init__(self, event: str, stop: StopRequest, total: int | None = None) -> None:
        super().__init__(event, total)
        self._stop = stop

    def advance(self, amount: int = 1, **facts: int) -> None:
        """Note more units of work; raise :class:`Stopped` after a stop request."""
        pulse.note()
        if self._stop.signal_name is not None:
            raise Stopped(f"stopped by {self._stop.signal_name} while {self._event}.")
        super().advance(amount, **facts)
