"""The adapters of a model by name."""

from collections.abc import Callable
from pathlib import Path

from ...errors import ConfigError
from .adapter import Adapter

ReadAdapter = Callable[[str, Path], Adapter]
"""Reads the adapter of a name from a folder."""


class AdapterTable:
    """Adapters that requests may name. Who holds an adapter keeps it, whatever happens here."""

    def __init__(self, read: ReadAdapter | None = None) -> None:
        self._read = read
        self._adapters: dict[str, Adapter] = {}

    @property
    def names(self) -> list[str]:
        """The names, oldest first."""
        return list(self._adapters)

    def load(self, name: str, folder: Path) -> None:
        """Read an adapter; raises :class:`ConfigError` for a name that is taken or empty, and
        :class:`ModelFileError` for a folder that does not fit the model."""
        if not name or not name.isprintable():
            raise ConfigError(f"adapter name is {name!r}; use printable characters.")
        if self._read is None:
            raise ConfigError(f"adapter {name!r} needs a model that came from a folder.")
        adapter = None if name in self._adapters else self._read(name, folder)
        # Asked again after reading: another thread may have loaded the name meanwhile.
        if adapter is None or self._adapters.setdefault(name, adapter) is not adapter:
            raise ConfigError(f"adapter {name!r} is there already; unload it or use another name.")

    def unload(self, name: str) -> None:
        """Forget an adapter; requests that run finish with it."""
        self.get(name)
        self._adapters.pop(name, None)

    def get(self, name: str) -> Adapter:
        """Return an adapter, or raise :class:`ConfigError` that names those there are."""
        adapter = self._adapters.get(name)
        if adapter is None:
            known = ", ".join(map(repr, self._adapters)) or "none"
            raise ConfigError(f"adapter is {name!r}, but the model has {known}; load it first.")
        return adapter
