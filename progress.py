"""Progress of long work: a bar on a terminal, a key=value line every few seconds otherwise."""

import os
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

FIRST_LINE_S = 2
"""Work that ends sooner prints no line."""
LINE_EVERY_S = 5
REFRESH_S = 0.1


class Progress:
    """Shows the progress of ``event`` on standard error.

    ``total`` is the sum of the amounts that :meth:`advance` will get, None if unknown. ``in_bytes``
    says that the amounts are bytes. Used by one thread.
    """

    def __init__(self, event: str, total: int | None = None, *, in_bytes: bool = False) -> None:
        self._event, self._total, self._in_bytes = event, total, in_bytes
        self._done = 0
        self._facts: dict[str, int] = {}
        self._started = self._shown = time.monotonic()
        self._has_lines = False
        self._bar: Bar | None = None
        if sys.stderr.isatty() or os.environ.get("FORCE_COLOR"):
            self._bar = _new_bar(event, in_bytes)
            self._task = self._bar.add_task("", total=total, status="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._refresh(self._bar)
            self._bar.stop()
        elif kind is None and self._has_lines:
            self._line("done")

    def note(self, **facts: int) -> None:
        """Change what is shown next."""
        self._facts.update(facts)

    def advance(self, amount: int = 1, **facts: int) -> None:
        """Note that ``amount`` more is done."""
        self._done += amount
        self.note(**facts)
        now = time.monotonic()
        if self._bar is not None:
            if now - self._shown > REFRESH_S:
                self._refresh(self._bar)
                self._shown = now
        elif now - self._shown > (LINE_EVERY_S if self._has_lines else FIRST_LINE_S):
            self._line("running")
            self._shown, self._has_lines = now, True

    def _refresh(self, bar: "Bar") -> None:
        status = "  ".join(f"{value:,} {name}" for name, value in self._facts.items())
        bar.update(self._task, completed=self._done, status=status)

    def _line(self, state: str) -> None:
        facts: dict[str, object] = {"event": self._event.replace(" ", "_"), "state": state}
        if self._in_bytes:
            facts["mib"] = f"{self._done / 2**20:.0f}"
        facts |= self._facts
        if self._total:
            facts["share"] = f"{min(1, self._done / self._total):.2f}"
        facts["seconds"] = f"{time.monotonic() - self._started:.1f}"
        text = " ".join(f"{key}={value}" for key, value in facts.items())
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


def _new_bar(event: str, in_bytes: bool) -> "Bar":
    """Return a bar on standard error. Only terminals need rich, which takes 5 MB."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns: tuple[ProgressColumn, ...] = (TextColumn(event), BarColumn())
    if in_bytes:
        columns += (DownloadColumn(binary_units=True), TimeRemainingColumn())
    columns += (TextColumn("{task.fields[status]}"), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True))
