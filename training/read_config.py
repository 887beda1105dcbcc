"""Read a run's configuration: the file, the overrides, and the folder that it starts from."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..configuration import read_values, validate_config
from .checkpoints.start_from import complete_values
from .config import RunConfig


def read_run_config(path: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read ``path`` and what ``start_from`` names; every problem is a :class:`ConfigError`."""
    return complete_run_config(read_values(path, overrides))


def complete_run_config(values: dict[str, Any]) -> RunConfig:
    """Validate ``values`` together with what ``start_from`` says."""
    return validate_config(RunConfig, complete_values(values))
