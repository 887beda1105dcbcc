"""What was decided about experts, in a few sentences."""

from dataclasses import dataclass

from .bounds import Bound, Speeds
from .budget import Room
from .sizes import ModelSizes


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What a server or a command starts with."""

    sizes: ModelSizes
    num_slots: int
    slots_bytes: int
    """Of all slots together."""
    room: Room | None = None
    """How memory was divided, if the budget was auto."""
    host_bytes: int = 0
    num_replicas: int = 1
    reader: str | None = None
    """How the disk is read, as a sentence; None if it is not."""
    policy: str = "decayed_lfu"
    predictor: str | None = None
    speeds: Speeds
    bound: Bound
    is_recorded: bool = False
    """Whether the bound's hit rate is that of recorded routes."""
    lossy: tuple[str, ...] = ()
    """A sentence for each lossy way in which the model runs."""


def describe(decision: Decision) -> str:
    """Return the paragraph, a line for each subject."""
    lines = [_slots(decision)]
    if decision.room is not None:
        lines.append(_room(decision.room))
    if decision.num_slots < decision.sizes.num_experts:
        lines += [_tiers(decision), _order(decision)]
    lines.append(_speed(decision))
    lines += decision.lossy
    return "".join(f"{line}\n" for line in lines)


def size(num_bytes: float) -> str:
    """Return bytes as people write them."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.3g} {name}"
    return f"{num_bytes:.0f} bytes"


def per_second(bytes_per_s: float) -> str:
    """Return a bandwidth as people write it."""
    if bytes_per_s < 1e9:
        return f"{bytes_per_s / 1e6:.3g} MB/s"
    return f"{bytes_per_s / 1e9:.3g} GB/s"


def tokens(per_s: float) -> str:
    """Return tokens, or other rows, per second as people write them."""
    return f"{per_s:,.0f}" if per_s >= 100 else f"{per_s:.3g}"


def _slots(decision: Decision) -> str:
    sizes, slots = decision.sizes, decision.num_slots
    each = " in each replica" if decision.num_replicas > 1 else ""
    if slots >= sizes.num_experts:
        return f"All {sizes.num_experts} experts are in memory{each}: " + (
            f"{size(sizes.all_experts_bytes)}."
        )
    return (
        f"Memory holds {slots} of {sizes.num_experts} experts{each}: "
        f"{size(decision.slots_bytes)}, {size(sizes.expert_bytes)} each"
        f"{' on average' if sizes.widths else ''}."
    )


def _room(room: Room) -> str:
    parts = [
        f"{size(room.num_replicas * room.dense_bytes)} for other weights",
        f"{size(room.num_replicas * room.kv_bytes)} for keys and values",
        f"{size(room.other_bytes)} for processes",
    ]
    if room.host_bytes:
        parts.append(f"{size(room.host_bytes)} for host memory")
    if room.copies_bytes:
        parts.append(f"{size(room.num_replicas * room.copies_bytes)} for copies of experts")
    spare = room.reserve_bytes + room.num_replicas * room.page_cache_bytes
    text = f"{size(room.available_bytes)} of memory are free: {', '.join(parts)}, {size(spare)} "
    text += "stay free."
    if room.kv_bytes < room.kv_wanted_bytes:
        text += (
            f" Keys and values of all requests at full length would take "
            f"{size(room.num_replicas * room.kv_wanted_bytes)}."
        )
    return text


def _tiers(decision: Decision) -> str:
    reader = decision.reader or "Experts are read from disk."
    if not decision.host_bytes:
        return reader
    return (
        f"Host memory keeps up to {size(decision.host_bytes)} of experts that were read, one copy "
        f"for all replicas. {reader}"
    )


def _order(decision: Decision) -> str:
    ahead = (
        f"{decision.predictor} says what is read ahead"
        if decision.predictor
        else "experts are read ahead only where the router chooses early"
    )
    return f"The policy {decision.policy} says which expert leaves memory, and {ahead}."


def _speed(decision: Decision) -> str:
    bound, speeds, sizes = decision.bound, decision.speeds, decision.sizes
    memory = f"a {sizes.row_name} reads {size(sizes.bytes_per_token)} of weights at "
    memory += per_second(speeds.memory)
    rows = f"{sizes.row_names}/s"
    if decision.num_slots >= sizes.num_experts:
        return f"Upper bound for one request: {tokens(bound.on_demand)} {rows}; {memory}."
    source = (
        "recorded routes say so"
        if decision.is_recorded
        else "as if all were needed equally often; real texts do better"
    )
    return (
        f"Upper bound for one request: {tokens(bound.on_demand)} {rows} on demand, "
        f"{tokens(bound.read_ahead)} if all reads were ahead of need. Of the "
        f"{sizes.experts_per_token} experts of a {sizes.row_name} {bound.hit_rate:.0%} are in "
        f"memory ({source}), and {memory}."
    )
