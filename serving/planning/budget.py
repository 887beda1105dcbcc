"""``--expert-memory auto``: what a machine can spare for experts."""

from dataclasses import dataclass

from ...errors import ConfigError
from ...moe.kv_blocks import KVDtype
from .sizes import ModelSizes

PROCESS_BYTES = 640 << 20
"""Python, torch and Ray in one process of a server, without weights."""
RAY_BYTES = 1 << 30
"""Ray's other processes: its controller, its proxy, its agents."""
RESERVE = 0.05
"""Share of free memory that stays free, for what else runs on the machine."""
KV_SHARE = 0.25
"""Most of what is left after the weights outside the experts that is kept for keys and values, if
all requests at their greatest length need more."""
PAGE_CACHE_BYTES = 256 << 20
"""For the system's page cache, where experts are read through it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What a server will be asked for."""

    max_num_seqs: int = 1
    max_model_len: int | None = None
    num_replicas: int = 1
    host_bytes: int = 0
    copies_bytes: int = 0
    """Low-bit copies of all experts, in each replica."""
    kv_bytes: int | None = None
    """Budget for keys and values in each replica; None = what is wanted, up to a share."""
    kv_dtype: KVDtype | None = None
    """What they are rounded to; None = the model's type."""
    other_bytes: int = PROCESS_BYTES
    """What all processes take apart from weights, keys and values."""


def demand_of_server(
    max_num_seqs: int,
    max_model_len: int | None,
    num_replicas: int,
    host_bytes: int,
    copies_bytes: int = 0,
    kv_dtype: KVDtype | None = None,
) -> Demand:
    """Return the demand of ``moeyard serve``."""
    return Demand(
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        num_replicas=num_replicas,
        host_bytes=host_bytes,
        copies_bytes=copies_bytes,
        kv_dtype=kv_dtype,
        other_bytes=RAY_BYTES + num_replicas * PROCESS_BYTES,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """How free memory is divided. Bytes of one replica, unless they say otherwise."""

    available_bytes: int
    """Free on the machine before anything starts."""
    reserve_bytes: int
    """Stay free on the machine."""
    other_bytes: int
    """Of all processes together, apart from weights, keys and values."""
    host_bytes: int
    """Of the machine."""
    num_replicas: int
    dense_bytes: int
    kv_wanted_bytes: int
    """If all requests had their greatest length."""
    kv_bytes: int
    """Kept for keys and values."""
    page_cache_bytes: int
    experts_bytes: int
    """Left for experts; may be below 0."""
    fits_all: bool
    """Whether all experts fit."""
    copies_bytes: int = 0
    """Low-bit copies of all experts; none are needed where all fit."""


def divide(
    sizes: ModelSizes, available_bytes: int, demand: Demand, is_buffered: bool = True
) -> Room:
    """Divide ``available_bytes``; ``is_buffered`` says that reads go through the page cache."""
    reserve = int(available_bytes * RESERVE)
    whole = available_bytes - reserve - demand.other_bytes - demand.host_bytes
    each = whole // demand.num_replicas - sizes.dense_bytes - demand.copies_bytes
    length = demand.max_model_len or sizes.max_positions
    wanted = demand.max_num_seqs * length * sizes.kv_bytes_per_token
    kv = demand.kv_bytes
    if kv is None:
        kv = min(wanted, int(max(0, each) * KV_SHARE))
    left = each - kv
    fits_all = left + demand.copies_bytes >= sizes.all_experts_bytes
    page_cache = 0 if fits_all or not is_buffered else PAGE_CACHE_BYTES // demand.num_replicas
    return Room(
        available_bytes=available_bytes,
        reserve_bytes=reserve,
        other_bytes=demand.other_bytes,
        host_bytes=demand.host_bytes,
        num_replicas=demand.num_replicas,
        dense_bytes=sizes.dense_bytes,
        kv_wanted_bytes=wanted,
        kv_bytes=kv,
        page_cache_bytes=page_cache,
        experts_bytes=left - page_cache,
        fits_all=fits_all,
        copies_bytes=0 if fits_all else demand.copies_bytes,
    )


def auto_budget(sizes: ModelSizes, room: Room) -> str | None:
    """Return a budget as people write it, or None where all experts fit.

    Raises :class:`ConfigError` where not one fits.
    """
    if room.fits_all:
        return None
    if room.experts_bytes < sizes.smallest_budget:
        gib = 1 << 30
        raise ConfigError(
            f"expert-memory is auto, but {room.available_bytes / gib:.3g} GiB of free memory "
            f"leave no room for one expert: {room.num_replicas} x {room.dense_bytes / gib:.3g} "
            f"GiB of other weights and {room.other_bytes / gib:.3g} GiB of processes come first; "
            "use a machine with more, or fewer replicas."
        )
    return f"{sizes.bytes_of(sizes.slots_within(room.experts_bytes))}B"
