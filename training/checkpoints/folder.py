"""The ``checkpoints`` folder of a run: its steps, and how a new one takes its place."""

import re
import shutil
import time
from pathlib import Path

from ...files import sync


class StepsFolder:
    """The checkpoints that lie in a run's folder, by step. Rank 0 changes them."""

    def __init__(self, run_dir: Path, keep: int) -> None:
        self._run_dir = run_dir
        self.path = run_dir / "checkpoints"
        self._keep = keep

    def of(self, step: int) -> Path:
        """Return where the checkpoint of a step is, or will be."""
        return self.path / f"step-{step:08d}"

    def steps(self) -> list[Path]:
        """Return the checkpoints, newest first."""
        if not self.path.is_dir():
            return []
        return sorted(filter(_is_step, self.path.iterdir()), reverse=True)

    def prepare(self, temporary: Path) -> None:
        """Make a hidden folder for a new checkpoint, and delete what a killed run left."""
        self.path.mkdir(parents=True, exist_ok=True)
        for leftover in self.path.glob(".tmp-*"):
            shutil.rmtree(leftover)
        temporary.mkdir()

    def commit(self, temporary: Path, final: Path) -> None:
        """Give a hidden folder its name; set damaged checkpoints aside and keep the newest.

        What needs disk space comes before the rename, so that ``latest`` stays correct.
        """
        latest = self._run_dir / ".latest.tmp"
        latest.write_text(final.name + "\n", encoding="utf-8")
        sync(latest)
        for damaged in self.steps():
            if damaged >= final:  # newer, so it failed verification when this run resumed
                damaged.rename(damaged.with_name(f"damaged-{damaged.name}-{time.time_ns()}"))
        temporary.rename(final)
        sync(self.path)
        latest.replace(self._run_dir / "latest")
        sync(self._run_dir)
        for old in self.steps()[self._keep :]:
            shutil.rmtree(old)


def step_of(path: Path) -> int:
    """Return the step of a checkpoint."""
    return int(path.name.removeprefix("step-"))


def _is_step(path: Path) -> bool:
    return re.fullmatch(r"step-\d{8}", path.name) is not None
