"""The drafters by name: a new one is a file next to this one and a line here."""

from collections.abc import Callable

from ...errors import ConfigError
from .drafter import Drafter
from .ngrams import Ngrams
from .suffixes import Suffixes

DRAFTERS: dict[str, Callable[[], Drafter]] = {"ngram": Ngrams, "suffix": Suffixes}
NONE = "none"


def drafter_named(name: str) -> Callable[[], Drafter] | None:
    """Return what makes a drafter for each text; None for ``none``.

    Raises :class:`ConfigError` for unknown names.
    """
    if name == NONE:
        return None
    if name not in DRAFTERS:
        raise ConfigError(f"speculative is {name!r}; use one of {', '.join((NONE, *DRAFTERS))}.")
    return DRAFTERS[name]
