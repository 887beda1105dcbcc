"""What files of a run's data were made from, and so whether they are still right."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open


def origin_of(facts: Any) -> str:
    """Return a hash of what files are made from; ``facts`` are JSON values."""
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def are_made_from(paths: Sequence[Path], origin: str, prints: Sequence[str | None]) -> bool:
    """Say whether all files are there and have this origin.

    ``prints`` are the fingerprints of the sources; None for one that has just changed, and then
    files are made again.
    """
    return None not in prints and all(_made_from(path) == origin for path in paths)


def _made_from(path: Path) -> str | None:
    """Return what a file was made from, None if there is no such file."""
    if not path.is_file():
        return None
    with safe_open(path, "np") as file:
        return (file.metadata() or {}).get("made_from")
