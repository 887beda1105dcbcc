"""What a block is: how the output of an MoE layer joins the residual stream.

A block may carry a state from MoE layer to MoE layer, so the layers of a model are the steps of an
iteration. The state belongs to the rows of one forward. Nothing of it is kept for the next token:
a token's state follows from its own rows in earlier layers.

T tokens, D model width.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

State = tuple[Tensor, ...]
"""Tensors ``[T, D]`` of :func:`state_type`; none before the first MoE layer."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where an MoE layer stands among those of its model."""

    index: int
    """MoE layers before it."""
    count: int
    """MoE layers of the model."""


class BlockConfig(BaseModel):
    """Base of configurations: the fields of a ``block:`` section, and what they do.

    Blocks have no weights. They compute each element of a row by itself, so bits do not depend on
    the other rows.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    paper: ClassVar[str] = ""
    """Where the block comes from."""

    kind: str

    def experts_read(self, x_TD: Tensor, state: State) -> Tensor:
        """Return the rows that the MoE layer's norm and experts read; ``x_TD`` itself by default.

        ``x_TD`` is the residual stream after attention.
        """
        return x_TD

    def join(self, x_TD: Tensor, y_TD: Tensor, state: State, place: Place) -> tuple[Tensor, State]:
        """Return the residual stream with the experts' output ``y_TD``, and the next state."""
        raise NotImplementedError

    def num_carried(self, place: Place) -> int:
        """Return how many tensors the state has when it comes to the MoE layer at ``place``."""
        return 0

    def architecture(self) -> dict[str, Any]:
        """Return what the meaning of weights depends on; equivalent blocks give equal results."""
        return self.model_dump(mode="json")


def state_type(dtype: torch.dtype) -> torch.dtype:
    """Return the type of a state, at least fp32: small steps add up over layers."""
    return torch.promote_types(dtype, torch.float32)


def wide(x_TD: Tensor) -> Tensor:
    """Return ``x_TD`` in the type of a state."""
    return x_TD.to(state_type(x_TD.dtype))
