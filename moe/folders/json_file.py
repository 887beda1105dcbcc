"""The JSON files of a model folder."""

import json
from pathlib import Path
from typing import Any

from ...errors import ModelFileError
from ...files import read_small_file

MAX_BYTES = 64 << 20
"""Largest file in bytes. The index of 100,000 tensors has 10 MB."""
MAX_KEYS = 10_000
"""Most keys of an object. Configurations have a hundred; transformers takes 15 s for a million."""


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, or raise :class:`ModelFileError`."""
    try:
        values = json.loads(read_small_file(path, MAX_BYTES).decode())
    except OSError as error:
        if not path.parent.exists():
            raise ModelFileError(
                f"{path.parent} does not exist; give a Hugging Face model folder or a run's folder."
            ) from None
        if (path.parent / "config.yaml").is_file():
            raise ModelFileError(
                f"{path.parent} is a run, which has no {path.name}; export it first, with moeyard "
                f"export {path.parent} FOLDER."
            ) from None
        raise ModelFileError(
            f"{path} cannot be read ({error.strerror}); give a Hugging Face model folder."
        ) from None
    except (ValueError, RecursionError, MemoryError):
        raise ModelFileError(f"{path} is not JSON; copy it again.") from None
    if not isinstance(values, dict):
        raise ModelFileError(f"{path} is not a JSON object; copy it again.")
    if len(values) > MAX_KEYS:
        raise ModelFileError(
            f"{path} has {len(values)} keys, at most {MAX_KEYS} are read; copy it again."
        )
    return values
