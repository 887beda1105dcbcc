"""What every client script shares: its arguments, and checks that say what they saw."""

import os
import sys
from typing import Any

API_KEY = os.environ.get("OPENAI_API_KEY", "none")
"""The server's key; a server without a key takes any."""


def arguments() -> tuple[str, str, str]:
    """Return the base URL without ``/v1``, the model's name and its tokenizer's folder."""
    if len(sys.argv) != 4:
        sys.exit(f"usage: {sys.argv[0]} BASE_URL MODEL TOKENIZER_FOLDER")
    return sys.argv[1].rstrip("/"), sys.argv[2], sys.argv[3]


def expect(what: str, got: Any, wanted: Any) -> None:
    """End with a sentence unless the value is the wanted one."""
    if got != wanted:
        sys.exit(f"error: {what} is {got!r}, not {wanted!r}")
