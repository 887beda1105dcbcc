"""Whether a source that a configuration names is there."""

from pathlib import Path

from ...errors import DataError


def existing(source: str, field: str) -> Path:
    """Return the path of a file or a folder; ``field`` is the key whose value ``source`` is.

    Raises :class:`DataError` if it is not there.
    """
    path = Path(source)
    if not path.exists():
        raise DataError(f"{field} is {source!r}, which is not there; give another path.")
    return path
