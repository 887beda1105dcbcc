"""Stop requests: after SIGTERM, SIGINT or SIGHUP the current step ends and the run saves."""

import signal
from types import FrameType

from ..parallel.parent import is_torchrun_worker


class StopRequest:
    """Remembers that a stop was asked for. A second Ctrl-C interrupts immediately."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

    def listen(self) -> None:
        """Handle SIGTERM, SIGINT and SIGHUP, which a terminal sends when it is closed.

        Under ``nohup`` SIGHUP stays ignored, except under torchrun. torchrun reacts to SIGHUP in
        any case: it passes the signal on and kills workers that do not end.
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
