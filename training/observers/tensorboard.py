"""TensorBoard event files in the run folder."""

from pathlib import Path
from typing import Any

from ...errors import ConfigError
from .observers import Observer, scalars

FOLDER = "tensorboard"


class TensorBoard(Observer):
    """Writes every record's scalars; steps that a resumed run repeats are purged."""

    def __init__(self, run_dir: Path, resume_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError(
                "monitor.tensorboard is true, but TensorBoard is not installed; "
                "pip install 'moeyard[tensorboard]' or set it to false."
            ) from None
        self._writer = SummaryWriter(str(run_dir / FOLDER), purge_step=resume_step + 1)

    def record(self, record: dict[str, Any]) -> None:
        """Write the record's scalars."""
        for tag, value in scalars(record).items():
            self._writer.add_scalar(tag, value, record["step"])

    def close(self) -> None:
        """Flush and close the files."""
        self._writer.close()
