"""Open a model whose experts are divided between this process and other owners."""

import logging
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ...errors import ConfigError
from ...moe.folders.folder import ModelFolder
from ...moe.models.model import Model
from ..experts.budget import budget_bytes
from ..experts.forwards import announce_forwards
from ..experts.pools import pool_sizes
from ..experts.store import ExpertStore
from .connecting import host_identity
from .facts import Facts
from .hiring import Hiring
from .owner_spec import OwnerSpec
from .ownership import Ownership
from .placement_file import read_ownership
from .rebalance import EVERY, Rebalancer
from .run_experts import read_first
from .sharded import ShardedExperts
from .team import Team

log = logging.getLogger(__name__)


@dataclass(slots=True)
class ShardedModel:
    """How the experts of one model are divided. Opens one model; see options.py."""

    num_owners: int
    """With this process, which is owner 0."""
    hiring: Hiring
    placement: Path | None = None
    """A plan, or routes; None = neighbouring experts share an owner."""
    policy: str = "decayed_lfu"
    reader: str = "auto"
    allow_code: Sequence[str] = ()
    num_threads: int | None = None
    """Compute threads of each owner; None = as many as this process."""
    leaders_host: str = field(default_factory=host_identity)
    """What owners compare with their host; another text makes them listen on TCP."""
    rebalance_every: int = EVERY
    """Forwards between two looks at the load of owners."""
    team: Team | None = None
    """Once the model is open."""

    def start(self, files: ModelFolder, dtype: torch.dtype, expert_memory: str | None) -> str:
        """Begin to start the other owners; return the budget of this process.

        ``expert_memory`` bounds the experts of each owner; None = room for all that it owns.
        """
        ownership = read_ownership(self.placement, files.config, self.num_owners)
        secret = secrets.token_hex(32)
        own = self._budget(files, dtype, expert_memory, ownership, 0)
        for index in range(1, self.num_owners):
            num_bytes = self._budget(files, dtype, expert_memory, ownership, index)
            spec = OwnerSpec(
                index=index,
                model=str(files.path),
                dtype=str(dtype).removeprefix("torch."),
                budget_bytes=num_bytes,
                reads_first=self._first(files, dtype, num_bytes, ownership, index),
                policy=self.policy,
                reader=self.reader,
                allow_code=tuple(self.allow_code),
                num_threads=self.num_threads or torch.get_num_threads(),
                leaders_host=self.leaders_host,
                secret=secret,
            )
            self.hiring.start(spec)
        moe = files.config.moe
        assert moe is not None, "the owners were checked"
        rebalancer = Rebalancer(files.config.moe_layers, moe.num_experts, self.rebalance_every)
        self.team = Team(ownership, self.hiring, bytes.fromhex(secret), rebalancer)
        return f"{own}B"

    def attach(
        self, decoder: Model, store: ExpertStore, files: ModelFolder, dtype: torch.dtype
    ) -> None:
        """Give every MoE layer of ``decoder`` its experts: those of ``store`` and the owners'."""
        team = self.team
        assert team is not None, "start was called"
        own_bytes = store.pools.num_bytes
        read_first(store, self._first(files, dtype, own_bytes, team.ownership, 0))
        team.open(Facts.of(files, dtype, os.getpid(), store.num_slots))
        announce_forwards(decoder, team.begin)
        moe_layers = decoder.moe_layers()
        for index, layer in moe_layers:
            sizes = (index, layer.num_experts, len(moe_layers))
            layer.experts = ShardedExperts(store, team, *sizes)

    def close(self) -> None:
        """End the owners."""
        if self.team is not None:
            self.team.close()

    def _budget(
        self,
        files: ModelFolder,
        dtype: torch.dtype,
        expert_memory: str | None,
        ownership: Ownership,
        owner: int,
    ) -> int:
        """Return bytes for an owner's experts: no more than it owns, and at least one slot."""
        smallest = sum(size.slot_bytes for size in pool_sizes(files, dtype))
        owned = max(smallest, _owned_bytes(files, dtype, ownership, owner))
        if expert_memory is None:
            return owned
        asked = budget_bytes(files, dtype, expert_memory)
        if asked < smallest:
            raise ConfigError(
                f"expert-memory is {asked} bytes for each of {self.num_owners} owners, but one "
                f"expert takes {smallest}; give at least that."
            )
        return min(asked, owned)

    @staticmethod
    def _first(
        files: ModelFolder, dtype: torch.dtype, num_bytes: int, ownership: Ownership, owner: int
    ) -> dict[int, list[int]]:
        """Return what is read before the first request: all of an owner's, if it has room."""
        if num_bytes < _owned_bytes(files, dtype, ownership, owner):
            return {}
        return ownership.owned_by(owner)


def _owned_bytes(files: ModelFolder, dtype: torch.dtype, ownership: Ownership, owner: int) -> int:
    sizes = pool_sizes(files, dtype)
    kind_of = files.formats.kind_of
    return sum(
        sizes[kind_of.get((layer, expert), 0)].slot_bytes
        for layer, experts in ownership.owned_by(owner).items()
        for expert in experts
    )
