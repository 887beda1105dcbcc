"""The packages that only serving needs. Imports none of them."""

import importlib.util

from ..errors import ConfigError

NEEDED = ("ray", "fastapi", "starlette", "uvicorn")
"""What the extra ``serve`` of pyproject.toml brings."""


def check_packages() -> None:
    """Raise :class:`ConfigError` with the command that installs what is missing."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"moeyard serve needs packages that are not installed ({', '.join(missing)}); "
            "pip install 'moeyard[serve]'."
        )
