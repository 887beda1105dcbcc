"""Write quantized matrices in the compressed-tensors layout, one at a time.

Q outputs and P inputs of a matrix.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from ...errors import ConfigError
from ...kernels.values.quantize import INT4_GROUP_SIZE, quantize
from ...kernels.values.quantized_weights import WIDTH_UNIT, Bits
from ..config.model import LayersConfig
from .compressed_tensors import PackedFormat, names_of, slot_view, to_stored
from .shards import TensorPlan


def choose_format(config: LayersConfig, bits: Bits) -> PackedFormat:
    """Return how to round a model's experts: 8 bits per row, 4 bits in the widest possible groups.

    Raises :class:`ConfigError` for a model without experts or with widths that no group divides.
    """
    if config.moe is None:
        raise ConfigError(f"dtype is int{bits}, but the model has no experts; use bf16 or fp32.")
    widths = (config.d_model, config.moe.d_expert)
    for group_size in (INT4_GROUP_SIZE, WIDTH_UNIT):
        if all(width % group_size == 0 for width in widths):
            return PackedFormat(bits, None if bits == 8 else group_size)
    raise ConfigError(
        f"dtype is int{bits}, but the experts' widths are {widths[0]} and {widths[1]}, which must "
        f"be multiples of {WIDTH_UNIT}; use bf16 or fp32."
    )


def pack(plan: TensorPlan, packed: PackedFormat) -> Iterator[TensorPlan]:
    """Yield the stored tensors of matrix ``plan``."""
    matrix = _PackedMatrix(plan, packed)
    for name, (dtype, shape) in packed.stored(plan.name, *plan.shape).items():
        if dtype == torch.int64:
            # weight_shape: no read of an expert needs it, so it does not lie between the matrices.
            yield TensorPlan(name, dtype, shape, lambda: [torch.tensor(plan.shape)])
            continue
        take = partial(matrix.take, name)
        yield TensorPlan(name, dtype, shape, take, plan.layer, plan.expert)


class _PackedMatrix:
    """Rounds a matrix when its first tensor is read, and frees each tensor after that."""

    def __init__(self, plan: TensorPlan, packed: PackedFormat) -> None:
        self._plan, self._packed = plan, packed
        self._left: dict[str, Tensor] = {}

    def take(self, name: str) -> list[Tensor]:
        if not self._left:
            (weight_QP,) = self._plan.parts()
            group_size = self._packed.width_of_group(self._plan.name, weight_QP.shape[1])
            matrices = quantize(weight_QP.unsqueeze(0), self._packed.bits, group_size)
            self._left = to_stored(self._plan.name, slot_view(matrices, 0))
            del self._left[names_of(self._plan.name)[2]]
        return [self._left.pop(name)]
