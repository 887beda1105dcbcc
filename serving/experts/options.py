"""How an expert store works, as one value that goes from the command line to the store."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from ...moe.folders.folder import ModelFolder
from ...moe.models.model import Model
from .policies.policy import Policy
from .predictors.predictor import Predictor
from .store import ExpertStore
from .tiers.live import LiveTier


class Sharding(Protocol):
    """Divides the experts of a model between this process and others (expert_parallel/)."""

    def start(self, files: ModelFolder, dtype: torch.dtype, expert_memory: str | None) -> str:
        """Begin to start the other processes; return the budget of this one."""
        ...

    def attach(
        self, decoder: Model, store: ExpertStore, files: ModelFolder, dtype: torch.dtype
    ) -> None:
        """Give every MoE layer its experts, those of ``store`` and those of other processes."""
        ...

    def close(self) -> None:
        """End the other processes."""
        ...


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """Settings of an expert store, apart from its size."""

    policy: str | Policy = "decayed_lfu"
    """Which expert leaves memory: a name of ``policies/table.py``, or an object."""
    host_memory: str | None = None
    """Bound on the experts that a node keeps in Ray's object store for all its replicas."""
    log: Path | None = None
    """Where every event of the store is written (event_log.py)."""
    predictor: str | Predictor = "none"
    """Which experts the next layers may need: a name of ``predictors/table.py``, or an object."""
    sparsity: str | None = None
    """Which channels of experts are not read: ``exact`` or a file (sparsity.py); None = all."""
    reader: str = "auto"
    """``buffered`` reads through the page cache, ``direct`` around it; ``auto`` measures."""
    fallback: Path | None = None
    """Folder of the same model in fewer bits: experts that are missing are computed from it."""
    fallback_above: float | None = None
    """Experts whose share of the rows' weights is above this are waited for; None = none are."""
    correction: int | None = None
    """Tokens of a window that the exact model checks; None = it checks nothing."""
    correction_threshold: float | None = None
    """Probability from which a proposed token is accepted; None = only the exact model's choice."""

    live: LiveTier | None = None
    """Where updates put experts; None = they never change."""

    sharding: Sharding | None = None
    """Who else has experts; None = this process has them all."""

    def without_copies(self) -> "StoreOptions":
        """Return the options without copies of missing experts and what corrects them."""
        return replace(
            self, fallback=None, fallback_above=None, correction=None, correction_threshold=None
        )

    def exact(self) -> "StoreOptions":
        """Return the options without those that change answers."""
        return replace(self.without_copies(), sparsity=None)
