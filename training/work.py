"""Long work outside the training loop: visible while it runs, and ended when asked."""

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ..errors import Stopped
from .stop import StopRequest

LINE_EVERY_S = 5


class LongWork:
    """Shows a bar on a terminal and a key=value line every few seconds otherwise.

    ``total`` is how often :meth:`advance` will be called, None when nobody knows.
    """

    def __init__(self, event: str, stop: StopRequest, total: int | None = None) -> None:
        self._event, self._stop = event, stop
        self._calls, self._total = 0, total
        self._facts: dict[str, int] = {}
        self._started = self._shown = time.monotonic()
        self._has_lines = False
        """Work that was done before anybody could wonder leaves none."""
        self._progress: Progress | None = None
        console = Console(stderr=True)
        if console.is_terminal:
            columns = (TextColumn(event), BarColumn(), TextColumn("{task.fields[status]}"))
            self._progress = Progress(*columns, TimeElapsedColumn(), console=console)
            self._task = self._progress.add_task("", total=total, status="")

    def __enter__(self) -> Self:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
        elif kind is None and self._has_lines:
            self._line("done")

    def note(self, **facts: int) -> None:
        """Change what is shown next."""
        self._facts.update(facts)

    def advance(self, **facts: int) -> None:
        """Note one more unit of work. Raises :class:`Stopped` when somebody asked to stop."""
        if self._stop.signal_name is not None:
            raise Stopped(f"stopped by {self._stop.signal_name} while {self._event}.")
        self._calls += 1
        self.note(**facts)
        now = time.monotonic()
        if self._progress is not None:
            if now - self._shown > 0.1:
                status = "  ".join(f"{value:,} {name}" for name, value in self._facts.items())
                self._progress.update(self._task, completed=self._calls, status=status)
                self._shown = now
        elif now - self._shown > LINE_EVERY_S:
            self._line("running")
            self._shown, self._has_lines = now, True

    def _line(self, state: str) -> None:
        facts = {"event": self._event.replace(" ", "_"), "state": state, **self._facts}
        if self._total:
            facts["share"] = f"{min(1, self._calls / self._total):.2f}"
        facts["seconds"] = f"{time.monotonic() - self._started:.1f}"
        text = " ".join(f"{key}={value}" for key, value in facts.items())
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
