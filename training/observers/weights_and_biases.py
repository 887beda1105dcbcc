"""Weights & Biases: configuration and scalars of a run, nothing else."""

import sys
import uuid
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from ...files import replace_text
from ..config import RunConfig
from .observers import Observer, scalars

ID_FILE = "wandb-id"


class WeightsAndBiases(Observer):
    """Logs every record; a resumed run continues under the id kept in its folder.

    Steps that a resumed run repeats are bit-identical, so W&B may ignore the second time.
    """

    def __init__(self, config: RunConfig, run_dir: Path, project: str) -> None:
        try:
            import wandb
        except ImportError:
            raise ConfigError(
                f"monitor.wandb is {project!r}, but W&B is not installed; "
                "pip install 'moeyard[wandb]' or leave it out."
            ) from None
        id_file = run_dir / ID_FILE
        known = id_file.read_text(encoding="utf-8").strip() if id_file.exists() else ""
        run_id = known or uuid.uuid4().hex[:12]
        try:
            self._run = wandb.init(
                project=project,
                name=run_dir.name,
                id=run_id,
                resume="allow",
                dir=run_dir,
                config=config.model_dump(mode="json"),
                # Only the configuration and the scalars leave the machine.
                settings=wandb.Settings(console="off", disable_git=True, save_code=False),
            )
        except wandb.Error as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise ConfigError(
                f"monitor.wandb is {project!r}, but W&B did not start ({reason}); "
                "run wandb login, or set WANDB_MODE=offline."
            ) from None
        if not known:
            replace_text(id_file, run_id + "\n")

    def record(self, record: dict[str, Any]) -> None:
        """Send the record's scalars."""
        self._run.log(scalars(record), step=record["step"])

    def close(self) -> None:
        """Finish the run; mark it as failed if training ends with an error."""
        self._run.finish(exit_code=0 if sys.exception() is None else 1)
