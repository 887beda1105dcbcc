"""How fast a model can be at most: bytes per token over measured bandwidths."""

from dataclasses import dataclass

from .sizes import ModelSizes

COPY_PASSES = 3
"""A copy from host memory into a slot reads the bytes twice, for the checksum too, and writes
them once."""


@dataclass(frozen=True, slots=True)
class Speeds:
    """Bytes per second."""

    memory: float
    disk: float
    """Of the folder's experts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Copies:
    """How many experts are in memory, and what that is known to be worth."""

    num_slots: int
    num_in_host: int = 0
    """In host memory; experts in slots are there too."""
    hit_rate: float | None = None
    """Of the slots, from recorded routes; None: every expert counts as equally likely."""


@dataclass(frozen=True, slots=True)
class Bound:
    """Seconds per token of a single request, if nothing but moving bytes took time."""

    hit_rate: float
    """Experts that are in slots when a token needs them."""
    memory_s: float
    reads_s: float

    @property
    def on_demand(self) -> float:
        """Tokens per second when reads and computing follow each other."""
        return 1 / (self.memory_s + self.reads_s)

    @property
    def read_ahead(self) -> float:
        """Tokens per second when all reads happen while something else is computed."""
        return 1 / max(self.memory_s, self.reads_s)


def bound_of(sizes: ModelSizes, copies: Copies, speeds: Speeds) -> Bound:
    """Return the bound of a model.

    Texts need some experts more often than others, and the policies use that. So the rate for
    equally likely experts, the share that is in memory, is a floor.
    """
    memory_s = sizes.bytes_per_token / speeds.memory
    if copies.num_slots >= sizes.num_experts:
        return Bound(1.0, memory_s, 0.0)
    share = copies.num_slots / sizes.num_experts
    rate = share if copies.hit_rate is None else copies.hit_rate
    misses = sizes.experts_per_token * (1 - rate)
    in_host = min(1.0, copies.num_in_host / sizes.num_experts)
    from_host_s = COPY_PASSES * sizes.expert_bytes / speeds.memory
    from_disk_s = sizes.stored_expert_bytes / speeds.disk
    reads_s = misses * (in_host * from_host_s + (1 - in_host) * from_disk_s)
    return Bound(rate, memory_s, reads_s)
