"""The interface of a place that has every expert."""

from collections.abc import Callable
from typing import Protocol

from ....moe.folders.expert_layouts import ExpertViews
from ..policies.policy import Key
from ..reads import Straight


class Tier(Protocol):
    """A place that has every expert: a folder on disk, or faster memory in front of it."""

    def straight(self, key: Key, views: ExpertViews) -> Straight | None:
        """Return how C++ fills a slot with an expert; None if only :meth:`reads` can.

        ``views`` of a slot are always the same object.
        """
        ...

    def reads(self, key: Key, views: ExpertViews) -> list[Callable[[], None]]:
        """Return calls that fill the parts of a slot with an expert.

        Each call fills one part and runs in some thread of the read queue; it raises ``OSError``
        if the part cannot be read.
        """
        ...
