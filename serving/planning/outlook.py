"""Put together what is known of a model and a machine: sizes, budgets, bounds."""

from dataclasses import dataclass

import torch

from ...errors import ConfigError
from ...moe.folders.folder import ModelFolder
from ..experts.budget import AUTO, budget_bytes, count_in_pools, parse_budget
from ..experts.pools import Pools
from ..experts.reading.choose import plan_reads
from ..experts.reading.plan import ReadPlan
from .bandwidth import memory_bandwidth
from .bounds import Bound, Copies, Speeds, bound_of
from .budget import Demand, Room, auto_budget, divide
from .recorded_hits import RecordedHits
from .sizes import ModelSizes, sizes_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """A budget for experts, and what it means."""

    expert_memory: str
    num_slots: int
    experts_bytes: int
    needed_bytes: int
    """Of the machine: weights, keys and values, processes."""
    fits: bool
    bound: Bound


class Outlook:
    """A model folder on this machine. Opening it measures memory and disk for about a second."""

    def __init__(
        self, folder: ModelFolder, dtype: torch.dtype, demand: Demand, available_bytes: int
    ) -> None:
        self.demand = demand
        self.sizes: ModelSizes = sizes_of(folder, dtype, demand.kv_dtype)
        self.room: Room = divide(self.sizes, available_bytes, demand)
        self.speeds: Speeds
        self._folder, self._dtype = folder, dtype
        free = max(0, available_bytes - self.room.experts_bytes - self.sizes.dense_bytes)
        self.reads: ReadPlan = plan_reads(folder, "auto", free)
        self.speeds = Speeds(memory_bandwidth(), self.reads.bytes_per_s)

    @property
    def runs_here(self) -> str | None:
        """Return why the model does not run here with any budget, or None where it does."""
        try:
            auto_budget(self.sizes, self.room)
            return None
        except ConfigError as error:
            return str(error)

    def holds_one(self, share: str) -> bool:
        """Say whether a share of all experts, such as ``10%``, is at least one."""
        return parse_budget(share, self.sizes.all_experts_bytes) >= self.sizes.smallest_budget

    def option(self, expert_memory: str, recorded: RecordedHits | None = None) -> Option | None:
        """Return what a budget means; None for ``auto`` where not one expert fits into memory.

        Raises :class:`ConfigError` for a budget that no one can read, or that holds no expert.
        """
        sizes, room, demand = self.sizes, self.room, self.demand
        if expert_memory != AUTO:
            num_bytes = budget_bytes(self._folder, self._dtype, expert_memory)
            in_pools = count_in_pools(self._folder, self._dtype, num_bytes)
        elif self.runs_here is None:
            in_pools = sizes.slots_within(room.experts_bytes)
        else:
            return None
        num_slots, experts = sum(in_pools), sizes.bytes_of(in_pools)
        each = sizes.dense_bytes + room.kv_bytes + experts
        needed = demand.num_replicas * each + demand.other_bytes + demand.host_bytes
        rate = None if recorded is None else recorded.hit_rate(self._pools(in_pools))
        in_host = demand.host_bytes // sizes.expert_bytes
        copies = Copies(num_slots=num_slots, num_in_host=in_host, hit_rate=rate)
        return Option(
            expert_memory=expert_memory,
            num_slots=num_slots,
            experts_bytes=experts,
            needed_bytes=needed,
            fits=needed <= room.available_bytes,
            bound=bound_of(sizes, copies, self.speeds),
        )

    def _pools(self, in_pools: tuple[int, ...]) -> Pools:
        slot_bytes = tuple(pool.slot_bytes for pool in self.sizes.pools)
        return Pools(in_pools, slot_bytes, self._folder.formats.kind_of)
