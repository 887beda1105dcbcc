"""Read a run's configuration: the file, the overrides, and the folder that it starts from."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..configuration import read_values, validate_config
from .checkpoints.start_from import complete_values
from .config import RunConfig
from .deepspeed_settings import check_deepspeed


def read_run_config(path: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read ``path`` and what ``start_from`` names; every problem is a :class:`ConfigError`."""
    return complete_run_config(read_values(path, overrides))


def complete_run_config(values: dict[str, Any]) -> RunConfig:
    """Validate ``values`` together with what ``start_from`` says."""
    config = validate_config(RunConfig, complete_values(values))
    check_deepspeed(config)
    return config
