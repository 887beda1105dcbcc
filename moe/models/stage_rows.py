"""What passes from one stage of a decoder's layers to the next.

T tokens, D model width.
"""

from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

from ..blocks.block import State, state_type
from ..config.model import ModelConfig
from ..routers.routing import Lookahead


class StageRows(NamedTuple):
    """What one stage of a decoder hands to the next."""

    x_TD: Tensor
    """The residual stream."""
    gate_TD: Tensor | None = None
    """What the experts of the last MoE layer read, if the router of the next one reads it too and
    that is in a later stage (pre-gating)."""
    state: State = ()
    """What the block carries from MoE layer to MoE layer (moe/blocks)."""

    def tensors(self) -> list[Tensor]:
        """Return what is there, in the order of :func:`types_between`."""
        gate = [] if self.gate_TD is None else [self.gate_TD]
        return [self.x_TD, *gate, *self.state]

    @classmethod
    def of(cls, tensors: Sequence[Tensor], config: ModelConfig, boundary: int) -> Self:
        """Return what :meth:`tensors` was made of, in the stage that begins at ``boundary``."""
        x_TD, *others = tensors
        gate_TD = others.pop(0) if carries_gate_rows(config, boundary) else None
        return cls(x_TD, gate_TD, tuple(others))


def types_between(config: ModelConfig, boundary: int, dtype: torch.dtype) -> list[torch.dtype]:
    """Return the types of the tensors that pass from the layers before ``boundary`` to the others.

    ``dtype`` is that of the residual stream. None pass where no layer is on one of the sides.
    """
    if boundary in (0, config.num_layers):
        return []
    rows = [dtype] * (1 + carries_gate_rows(config, boundary))
    return rows + [state_type(dtype)] * num_state_tensors(config, boundary)


def carries_gate_rows(config: ModelConfig, boundary: int) -> bool:
    """Say whether rows for a router travel between the layers before ``boundary`` and the others.

    They do if the first MoE layer at or after it reads what the experts before it read.
    """
    later = [layer for layer in config.moe_layers if layer >= boundary]
    if not later or later[0] == config.moe_layers[0]:
        return False
    return config.router(later[0]).reads_at() is Lookahead.PREVIOUS_BLOCK


def num_state_tensors(config: ModelConfig, boundary: int) -> int:
    """Return how many tensors of a block's state the layers at and after ``boundary`` need."""
    place = config.place(boundary)
    if config.moe is None or place.index == place.count:
        return 0
    return config.moe.block.num_carried(place)
