"""Training output: a progress bar on a terminal, key=value lines otherwise."""

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class TrainingConsole:
    """Progress of one run; silent on ranks other than 0."""

    def __init__(self, first_step: int, steps: int, is_shown: bool) -> None:
        self._is_shown = is_shown
        self._steps = steps
        self._first_step = first_step
        self._started = time.monotonic()
        self._progress: Progress | None = None
        console = Console(stderr=True)
        if is_shown and console.is_terminal:
            self._progress = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}"),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._progress.add_task("", total=steps, completed=first_step, status="")
            self._progress.start()

    def step(self, done: int, record: dict[str, Any] | None) -> None:
        """Show that ``done`` steps are complete; ``record`` is what was logged, if anything."""
        if self._progress is not None:
            self._progress.update(self._task, completed=done)
            if record is not None:
                status = (
                    f"loss {record['loss']:.3f}  {record['tokens_per_s']:.0f} tok/s  "
                    f"load {_worst_load(record):.2f}"
                )
                self._progress.update(self._task, status=status)
        elif record is not None:
            elapsed = time.monotonic() - self._started
            left = elapsed / max(1, done - self._first_step) * (self._steps - done)
            self.line(
                step=f"{done}/{self._steps}",
                loss=f"{record['loss']:.4f}",
                tokens_per_s=f"{record['tokens_per_s']:.0f}",
                grad_norm=f"{record['grad_norm']:.3f}",
                lr=f"{record['lr']:.2e}",
                worst_load=f"{_worst_load(record):.2f}",
                left_s=f"{left:.0f}",
            )

    def line(self, **facts: Any) -> None:
        """Print one key=value line."""
        if self._is_shown:
            text = " ".join(f"{key}={value}" for key, value in facts.items())
            try:
                if self._progress is not None:
                    self._progress.console.print(text, highlight=False)
                else:
                    sys.stderr.write(text + "\n")
                    sys.stderr.flush()
            except OSError:  # the terminal was closed, and the run must still save
                self._is_shown, self._progress = False, None

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._progress is not None:
            self._progress.stop()


def _worst_load(record: dict[str, Any]) -> float:
    return max((layer["max_over_mean"] for layer in record["load"]), default=0.0)
