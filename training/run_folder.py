"""The folder of a run: merged configuration, metrics, checkpoints."""

import json
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError
from .config import RunConfig


def create_run_folder(config: RunConfig) -> Path:
    """Make the folder and write the merged configuration into it."""
    folder = Path(config.run_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"run_dir is {config.run_dir!r}, which cannot be written ({error.strerror}); "
            "choose another folder."
        ) from None
    return folder


def dump_config(config: RunConfig) -> str:
    """Return the configuration as YAML, defaults included."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


class MetricsLog:
    """``metrics.jsonl``: one JSON object per line, steps strictly rising.

    On resume, lines past the checkpoint are cut off, so that no step is there twice.
    """

    def __init__(self, folder: Path, resume_step: int) -> None:
        path = folder / "metrics.jsonl"
        kept = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    record = json.loads(line)
                except ValueError:
                    break  # the last line of a killed run may be half a line
                if record["step"] <= resume_step:
                    kept.append(line + "\n")
        path.write_text("".join(kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; it must have ``step``."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
