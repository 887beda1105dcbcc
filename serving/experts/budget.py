"""How many experts fit: memory budgets as people write them, ``2GiB``, ``500MB``, ``25%``."""

import re

import torch

from ...errors import ConfigError
from ...moe.folders.folder import ModelFolder
from .pools import bytes_of_slots, divide_slots, pool_sizes

AUTO = "auto"
"""The budget that leaves the choice to planning/."""
UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20}
UNITS |= {"gib": 1 << 30, "tib": 1 << 40, "tb": 10**12}


def parse_budget(text: str, whole_bytes: int, name: str = "expert-memory") -> int:
    """Return bytes; a percentage is taken of ``whole_bytes``. ``name`` is the option's."""
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,9})?)\s*(%|[a-zA-Z]+)\s*", text)
    unit = match.group(2).lower() if match else ""
    if match is None or (unit != "%" and unit not in UNITS):
        auto = ", or auto" if name == "expert-memory" else ""
        raise ConfigError(f"{name} is {text!r}; write a size like 2GiB or a share like 25%{auto}.")
    amount = float(match.group(1))
    if unit == "%":
        if not 0 < amount <= 100:
            raise ConfigError(f"{name} is {text!r}; a share must be above 0% and up to 100%.")
        return int(whole_bytes * amount / 100)
    return int(amount * UNITS[unit])


def budget_bytes(folder: ModelFolder, dtype: torch.dtype, expert_memory: str) -> int:
    """Return the bytes of a budget as people write it."""
    return parse_budget(expert_memory, _bytes_of_all(folder, dtype))


def count_slots(folder: ModelFolder, dtype: torch.dtype, budget_bytes: int) -> int:
    """Return how many experts a budget holds; :class:`ConfigError` where it holds none."""
    return sum(count_in_pools(folder, dtype, budget_bytes))


def count_in_pools(folder: ModelFolder, dtype: torch.dtype, budget_bytes: int) -> tuple[int, ...]:
    """Return how many experts of each width a budget holds, the widest first.

    Raises :class:`ConfigError` where it does not hold one of each.
    """
    sizes = pool_sizes(folder, dtype)
    if not sizes:
        raise ConfigError("expert-memory is set, but the model has no experts; leave it out.")
    num_slots = divide_slots(sizes, budget_bytes)
    if not any(num_slots):
        each = " of each width" if len(sizes) > 1 else ""
        raise ConfigError(
            f"expert-memory is {budget_bytes} bytes, but one expert{each} takes "
            f"{sum(size.slot_bytes for size in sizes)}; give at least that."
        )
    return num_slots


def bytes_of_experts(folder: ModelFolder, dtype: torch.dtype, expert_memory: str | None) -> int:
    """Return the bytes that experts will take: all of them, or the slots that a budget holds."""
    if expert_memory is None:
        return _bytes_of_all(folder, dtype)
    num_slots = count_in_pools(folder, dtype, budget_bytes(folder, dtype, expert_memory))
    return bytes_of_slots(num_slots, [size.slot_bytes for size in pool_sizes(folder, dtype)])


def host_bytes(folder: ModelFolder, dtype: torch.dtype, host_memory: str | None) -> int:
    """Return the bytes of host memory as people write it: ``8GiB``, or a share of all experts."""
    if host_memory is None or host_memory.strip() == "0":
        return 0
    num_bytes = parse_budget(host_memory, _bytes_of_all(folder, dtype), "host-memory")
    slot_bytes = max((size.slot_bytes for size in pool_sizes(folder, dtype)), default=0)
    if num_bytes < slot_bytes:
        raise ConfigError(
            f"host-memory is {num_bytes} bytes, but one expert takes {slot_bytes}; give more, or 0."
        )
    return num_bytes


def _bytes_of_all(folder: ModelFolder, dtype: torch.dtype) -> int:
    return sum(size.num_experts * size.slot_bytes for size in pool_sizes(folder, dtype))
