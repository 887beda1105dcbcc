"""Routers of a user's own code: ``kind: "mypkg.routers:MyRouter"`` names a class by import path.

A name in a file never imports anything. The user permits a module (``--allow-code mypkg.routers``),
which imports it; validation then finds its classes here. So a configuration or a model folder can
never run code by itself.
"""

import importlib
from collections.abc import Iterable
from types import ModuleType

from ...errors import ConfigError
from .router import RouterConfig

_permitted: dict[str, ModuleType] = {}


def allow(modules: str | Iterable[str]) -> None:
    """Import ``modules`` and permit their routers in this process; a string may join some by ``,``.

    Raises :class:`ConfigError` where one cannot be imported.
    """
    given = [modules] if isinstance(modules, str) else list(modules)
    for name in (name for part in given for name in part.split(",")):
        if name not in _permitted:
            _permitted[name] = _imported(name)


def permitted() -> dict[str, ModuleType]:
    """Return the modules that were permitted, by name."""
    return dict(_permitted)


def find_class(kind: str) -> type[RouterConfig]:
    """Return the class that ``kind`` names.

    Raises :class:`ConfigError` unless it is a router of a permitted module.
    """
    name, _, attribute = kind.partition(":")
    if name not in _permitted:
        raise ConfigError(
            f"router.kind is {kind!r}, a class of code that you have not permitted; if you trust "
            f"it, add --allow-code {name} (in Python: allow_code={name!r})."
        )
    found = getattr(_permitted[name], attribute, None)
    if found is None:
        raise ConfigError(
            f"router.kind is {kind!r}, but {name} has no {attribute!r}; name one of its classes."
        )
    if not (isinstance(found, type) and issubclass(found, RouterConfig)):
        raise ConfigError(
            f"router.kind is {kind!r}, which is not a subclass of moeyard.RouterConfig; name the "
            "class of the router's configuration."
        )
    check_class(found)
    return found


def check_class(router: type[RouterConfig]) -> None:
    """Raise :class:`ConfigError` if a user's class cannot be used in a configuration."""
    path = f"{router.__module__}:{router.__qualname__}"
    if router.build is RouterConfig.build:
        raise ConfigError(
            f"router is {path}, which has no build(self, sizes); define it, and return a "
            "moeyard.Router."
        )
    name = router.model_fields["kind"].default
    if name:
        raise ConfigError(
            f"router is {path}, which calls itself {name!r}, but short names are for moeyard's own "
            "routers; remove kind from the class, so that it goes by its import path."
        )


def _imported(name: str) -> ModuleType:
    if not all(part.isidentifier() for part in name.split(".")):
        raise ConfigError(
            f"allow_code is {name!r}, which is not the name of a module; use one such as "
            "mypkg.routers, without the class."
        )
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"allow_code is {name!r}, which cannot be imported ({error}); install it, or put its "
            "folder on PYTHONPATH."
        ) from error
    except Exception as error:  # user code can raise anything
        raise ConfigError(
            f"allow_code is {name!r}, which fails while it is imported "
            f"({type(error).__name__}: {error}); correct that module."
        ) from error
