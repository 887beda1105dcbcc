"""What speculation does not go with."""

from pathlib import Path

from ....errors import ConfigError
from ....moe.drafts.table import NONE, drafter_named


def check_speculative(
    name: str, record_routes: str | None = None, fallback: Path | None = None
) -> None:
    """Raise :class:`ConfigError` for unknown names, and for what drafted rows would spoil."""
    if drafter_named(name) is None:
        return
    if record_routes is not None:
        raise ConfigError(
            f"speculative is {name!r} and record-routes {record_routes!r}, but drafted tokens that "
            f"are wrong have routes, too; leave record-routes out, or set speculative to {NONE}."
        )
    if fallback is not None:
        raise ConfigError(
            f"speculative is {name!r} and expert-fallback {str(fallback)!r}, but drafted tokens "
            "change which experts are in memory, and so which are computed from copies; leave one "
            "out."
        )
