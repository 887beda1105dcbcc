"""Which tensor is where in a new folder: shards, the order in each, headers.

An expert is one extent: its tensors are neighbours, in one shard. Experts are first in a shard, and
the data of a shard with experts begins at a multiple of a page, for direct I/O. The format allows
no holes between tensors, so it is the JSON header that is filled up with spaces. Experts of most
models are whole pages, and then each of them begins with a page, too.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch import Tensor

from .file_reader import PAGE_BYTES
from .safetensors_file import STORED_DTYPES

DTYPE_NAMES = {dtype: name for name, dtype in STORED_DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """A tensor to be written, and the source of its contents."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: Callable[[], Iterable[Tensor]]
    """Called once, when the tensor is written. Yields it in consecutive pieces, each one row
    (``shape[1:]``) or several (``[n, *shape[1:]]``); most tensors are one piece."""
    layer: int | None = None
    """The layer whose experts are read from this tensor; None for everything else."""
    expert: int | None = None
    """The expert it is a part of; None where each row belongs to an expert of ``layer``."""

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return prod(self.shape) * self.dtype.itemsize


def fill_shards(plans: Iterable[TensorPlan], limit: int) -> list[list[TensorPlan]]:
    """Return the tensors of each shard in the order of the file.

    Shards hold at most ``limit`` bytes, unless a single tensor or expert is larger.
    """
    shards: list[list[list[TensorPlan]]] = [[]]
    size = 0
    for unit in _units(plans):
        num_bytes = sum(plan.num_bytes for plan in unit)
        if shards[-1] and size + num_bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(unit)
        size += num_bytes
    return [_in_order(units) for units in shards]


def header(shard: Sequence[TensorPlan]) -> bytes:
    """Return the bytes before the tensors: the length of a JSON object and the object."""
    values: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for plan in shard:
        end = start + plan.num_bytes
        values[plan.name] = {
            "dtype": DTYPE_NAMES[plan.dtype],
            "shape": list(plan.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(values, separators=(",", ":"), ensure_ascii=False).encode()
    has_experts = any(plan.layer is not None for plan in shard)
    text += b" " * (-(8 + len(text)) % (PAGE_BYTES if has_experts else 8))
    return len(text).to_bytes(8, "little") + text


def _units(plans: Iterable[TensorPlan]) -> list[list[TensorPlan]]:
    """Return what stays together: the tensors of an expert, wide types first; others alone."""
    units: dict[Any, list[TensorPlan]] = {}
    for plan in plans:
        key = plan.name if plan.expert is None else (plan.layer, plan.expert)
        units.setdefault(key, []).append(plan)
    return [_wide_first(unit) for unit in units.values()]


def _in_order(units: list[list[TensorPlan]]) -> list[TensorPlan]:
    experts = [plan for unit in units for plan in unit if plan.layer is not None]
    others = [plan for unit in units for plan in unit if plan.layer is None]
    order = experts + _wide_first(others)
    # Every tensor starts at a multiple of its type. Experts of an odd size would move the others,
    # so then wide types are first, as in safetensors. Experts of one type stay together there, too.
    return order if _is_aligned(order) else _wide_first(others + experts)


def _is_aligned(order: Sequence[TensorPlan]) -> bool:
    starts = accumulate((plan.num_bytes for plan in order), initial=0)
    return all(start % plan.dtype.itemsize == 0 for start, plan in zip(starts, order, strict=False))


def _wide_first(plans: list[TensorPlan]) -> list[TensorPlan]:
    return sorted(plans, key=lambda plan: -plan.dtype.itemsize)
