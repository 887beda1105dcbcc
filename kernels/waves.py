"""The expert MLP without gradients, some experts at a time.

T tokens, K choices, D model width, r some of the T*K routed rows.
"""

from collections.abc import Collection
from typing import Protocol

from torch import Tensor

from .cpu.experts import CppWaves, can_run
from .torch_ops.experts import TorchWaves
from .trust import may_use_cpp
from .values.quantized_weights import SlotWeights
from .values.row_channels import RowChannels


class Waves(Protocol):
    """An unfinished sum ``y_t = sum_k weights[t, k] * MLP_{experts[t, k]}(x_t)``.

    Every routed row has its own line, which its expert fills once; the lines are combined in k
    order at the end. So the bits do not depend on how experts are split into waves.
    """

    def add(self, experts: SlotWeights, only: Collection[int] | None = None) -> None:
        """Run all experts in slots, or ``only`` some of them."""
        ...

    def result(self) -> Tensor:
        """Return ``y``, ``[T, D]``, once every chosen expert has run."""
        ...


class LineWaves(Waves, Protocol):
    """A sum that takes lines which another process computed with the same kernels."""

    def lines(self, routed_r: Tensor) -> Tensor:
        """Return the lines of routed rows whose experts have run, ``[r, D]``.

        ``routed_r`` are their numbers: row ``t * K + k`` is choice k of token t. The type is fp32,
        or that of the rows where torch computes.
        """
        ...

    def fill(self, routed_r: Tensor, lines_rD: Tensor) -> None:
        """Take lines that :meth:`lines` returned elsewhere, as if their experts had run here."""
        ...


def start_waves(
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    num_experts: int,
    channels: RowChannels | None = None,
) -> LineWaves:
    """Begin a sum on the fastest backend that supports these rows.

    ``channels`` says which channels each row uses, for experts that are stored by channel.
    """
    if may_use_cpp(x_TD) and can_run(x_TD, weights_TK):
        return CppWaves(x_TD, experts_TK, weights_TK, channels)
    return TorchWaves(x_TD, experts_TK, weights_TK, num_experts, channels)
