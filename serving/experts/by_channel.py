"""Opens the reading of experts by channel: a folder laid out for it, and a rule that skips."""

from ...errors import ConfigError
from ...moe.folders.channel_layout import NativeExperts
from ...moe.folders.channel_reads import ChannelReads
from ...moe.folders.folder import ModelFolder
from .options import StoreOptions
from .sparsity import KINDS, Sparsity
from .tiers.channels import ChannelTier


def is_by_channel(folder: ModelFolder) -> bool:
    """Say whether a folder's experts are laid out by channel."""
    layout, layers = folder.family.experts, folder.config.moe_layers
    return isinstance(layout, NativeExperts) and layout.is_by_channel(folder.files, layers[0])


def open_channels(
    folder: ModelFolder, options: StoreOptions, sparsity: Sparsity | None
) -> ChannelTier | None:
    """Return the tier that reads gates first; None where experts are read as a whole.

    Raises :class:`ConfigError` for options that need whole experts, and scores that need more than
    gates.
    """
    if sparsity is None or not is_by_channel(folder):
        return None
    of = f"expert-sparsity is {options.sparsity!r} and {folder.path} is laid out by channel"
    if sparsity.score is not None and KINDS[sparsity.score] != ("gate",):
        raise ConfigError(
            f"{of}, but {sparsity.score} does not judge channels by their gate alone; use cats, "
            "chess or exact, or a folder that was converted without --expert-layout."
        )
    for name, value, reason in (
        ("expert-log", options.log, "a log knows whole experts only"),
        ("host-memory", options.host_memory, "host memory keeps whole experts only"),
        ("follow", options.live, "updates bring whole experts only"),
        ("expert-fallback", options.fallback, "copies stand in for whole experts only"),
    ):
        if value is not None and value != "0":
            raise ConfigError(f"{of}, but {name} is {str(value)!r} and {reason}; leave one out.")
    return ChannelTier(ChannelReads(folder))
