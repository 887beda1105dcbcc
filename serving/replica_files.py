"""Files that each replica of a server writes into a folder."""

from pathlib import Path

from ..errors import ConfigError
from ..moe.config.model import LayersConfig


def check_replica_files(
    config: LayersConfig,
    record_routes: str | None,
    expert_log: str | None,
    expert_memory: str | None,
) -> None:
    """Raise :class:`ConfigError` for files that would have nothing in them."""
    if record_routes is not None and config.moe is None:
        raise ConfigError(
            f"record-routes is {record_routes!r}, but the model has no experts; leave it out."
        )
    if expert_log is not None and expert_memory is None:
        raise ConfigError(
            f"expert-log is {expert_log!r}, but all experts are in memory; set expert-memory, or "
            "leave expert-log out."
        )


def replica_file(folder: str, replica: str, option: str, suffix: str) -> Path:
    """Return a replica's file in ``folder``, which is made; ``option`` names it in errors."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{option} {folder} cannot be made ({error.strerror}); give another folder."
        ) from None
    return Path(folder) / f"{replica}{suffix}"
