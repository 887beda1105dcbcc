"""A model folder whose experts are laid out by channel, as a tier that brings gates alone.

G groups of channels of an expert.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ....moe.folders.channel_reads import ChannelReads
from ....moe.folders.expert_layouts import ExpertViews
from ..policies.policy import Key
from ..pools import Pools
from ..reads import Straight
from .disk import read_patiently


class ChannelTier:
    """Fills the gate of a slot, and knows which channels have followed (channel_filler.py)."""

    def __init__(self, files: ChannelReads) -> None:
        self.files = files
        self.present_G: dict[Key, Tensor] = {}
        """bool: the groups that are in an expert's slot; stale for experts that are in none."""
        self.views: dict[Key, ExpertViews] = {}
        """The slot of an expert; stale likewise."""

    def pools(self, pools: Pools) -> Pools:
        """Return pools whose experts are as large as what :meth:`reads` brings."""
        return replace(pools, slot_bytes=(self.files.gate_bytes,))

    def straight(self, key: Key, views: ExpertViews) -> Straight | None:
        """Return None: which channels are here must be noted, too."""
        return None

    def reads(self, key: Key, views: ExpertViews) -> list[Callable[[], None]]:
        """Return one call per chunk of the gate, to be made one after the other."""
        self.present_G[key] = torch.zeros(self.files.num_groups, dtype=torch.bool)
        self.views[key] = views
        calls = self.files.gate_steps(key, views)
        return [partial(read_patiently, call) for call in calls]
