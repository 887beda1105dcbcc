"""How a leader gets its owners: who starts them and starts them again."""

from typing import Protocol

from .connecting import Address
from .owner_spec import OwnerSpec


class Hiring(Protocol):
    """Starts, watches and replaces owners. Any thread may call it."""

    def start(self, spec: OwnerSpec) -> None:
        """Begin to start an owner; do not wait until it is ready."""
        ...

    def address(self, index: int, timeout_s: float) -> Address:
        """Return where an owner listens; one that has ended is started again first.

        Raises :class:`LostPeerError` if it is not ready in time.
        """
        ...

    def replace(self, index: int) -> None:
        """End an owner that does not answer; :meth:`address` starts another."""
        ...

    def stop(self) -> None:
        """End all owners."""
        ...
