"""Stop when asked: SIGTERM, SIGINT and SIGHUP let the current step end, and the run save."""

import signal
from types import FrameType

from ..parallel.parent import is_torchrun_worker


class StopRequest:
    """Remembers that a stop was asked for. A second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

    def listen(self) -> None:
        """Take over SIGTERM, SIGINT and SIGHUP, which a terminal sends when it is closed.

        ``nohup`` has SIGHUP ignored, and so it stays; but not under torchrun, which heeds it all
        the same, hands it on and kills who does not end.
        """
        signal.signal(signal.SIGTERM, self._ask)
        signal.signal(signal.SIGINT, self._ask)
        is_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        if is_torchrun_worker() or not is_ignored:
            signal.signal(signal.SIGHUP, self._ask)

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        if self.signal_name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name
