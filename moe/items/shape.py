"""What a model of sessions was trained on: how many items it reads and writes."""

import json
from typing import NamedTuple

from ...errors import DataError

FILE = "sessions.json"
"""Name of the file in checkpoints and exports."""


class SessionShape(NamedTuple):
    """Sizes of histories and sessions."""

    session_items: int
    """Items of a session that the model generates."""
    history_items: int
    """Most items of a history that it reads, the newest."""

    def text(self) -> str:
        """Return the sizes as a JSON text, which :func:`read_shape` reads."""
        return json.dumps(self._asdict()) + "\n"


def read_shape(text: str, where: str) -> SessionShape:
    """Return the sizes of a JSON text; ``where`` names it in a :class:`DataError`."""
    try:
        values = json.loads(text)
        shape = SessionShape(**values)
    except (ValueError, TypeError, RecursionError):
        shape = SessionShape(0, 0)
    if not all(type(size) is int and size > 0 for size in shape):
        raise DataError(
            f"{where} has no session_items and history_items from 1 upwards; export the run again."
        )
    return shape
