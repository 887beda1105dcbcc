"""Whether a run publishes its weights for servers that follow it."""

from typing import Literal

from pydantic import Field

from .section import Section


class PublishConfig(Section):
    """Updates for ``moeyard serve --follow``: what has changed since the last one."""

    folder: str = Field(min_length=1)
    """Folder of the updates, one run's alone; rank 0 writes it. Servers only read it."""
    every: int = Field(default=100, ge=1)
    """Steps between updates; the last step always publishes."""
    full_every: int = Field(default=20, ge=1)
    """Every so many updates one is a full snapshot, from which a new server begins and one that has
    missed an update goes on. So is the first update of each start of the program."""
    keep: int = Field(default=2, ge=1)
    """Newest full snapshots kept, with the updates after them."""
    what: Literal["all", "experts"] = "all"
    """``experts`` leaves out routers and all other tensors, which stay as the server has them."""
