"""Stop when asked: SIGTERM, SIGINT and SIGHUP let the current step end, and the run save."""

import signal
from types import FrameType


class StopRequest:
    """Remembers that a stop was asked for. A second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

    def listen(self) -> None:
        """Take over SIGTERM, SIGINT and SIGHUP, which a terminal sends when it is closed.

        What ``nohup`` had ignored stays ignored.
        """
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._ask)

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        if self.signal_name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name
