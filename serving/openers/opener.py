"""What opens a kind of model."""

from collections.abc import Callable
from typing import Any, NamedTuple

from ...errors import ConfigError
from ...moe.folders.folder import ModelFolder
from ..experts.options import StoreOptions
from ..filling import Filled


class Opener(NamedTuple):
    """How models of some kinds are opened, and what people use for it."""

    open: Callable[[ModelFolder, Filled, StoreOptions], Any]
    """Return what is called with a user's data, around a model with its weights."""
    what: str
    """What is opened, for a message."""
    remedy: str
    """The command and the function that open the kind, for a message."""


def refuse_correction(files: ModelFolder, options: StoreOptions) -> None:
    """Raise :class:`ConfigError` for ``expert_correction``, which only decoders have."""
    if options.correction is not None:
        raise ConfigError(
            f"expert-correction is {options.correction}, which checks generated tokens, but "
            f"{files.path} is a model of kind {files.config.kind}; leave it out."
        )
