"""Experts that updates have replaced, in front of the model folder."""

from collections.abc import Callable, Mapping
from functools import partial

from ....moe.folders.expert_layouts import ExpertViews
from ....moe.updates.read import OpenUpdate
from ..policies.policy import Key
from ..reads import Straight
from .disk import read_patiently
from .tier import Tier


class LiveTier:
    """Reads an expert from the newest update that has it, and others from the folder."""

    def __init__(self) -> None:
        self._below: Tier | None = None
        self._update_of: dict[Key, OpenUpdate] = {}

    def over(self, below: Tier) -> "LiveTier":
        """Stand in front of ``below``; returns itself."""
        self._below = below
        return self

    def take(self, update_of: Mapping[Key, OpenUpdate]) -> None:
        """Read these experts from their updates from now on; no read of them is under way.

        Updates that no expert is read from any more are closed.
        """
        before = set(self._update_of.values())
        self._update_of |= update_of
        for update in before - set(self._update_of.values()):
            update.close()

    def straight(self, key: Key, views: ExpertViews) -> Straight | None:
        """Return how C++ reads an expert of the folder; None for one that an update has."""
        if self._below is None or key in self._update_of:
            return None
        return self._below.straight(key, views)

    def reads(self, key: Key, views: ExpertViews) -> list[Callable[[], None]]:
        """Return one call per chunk, to be made one after the other."""
        update = self._update_of.get(key)
        if update is None:
            assert self._below is not None, "a store has put it over a folder"
            return self._below.reads(key, views)
        return [partial(read_patiently, step) for step in update.expert_steps(key, views)]
