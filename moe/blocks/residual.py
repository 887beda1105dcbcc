"""The plain residual."""

from typing import Literal

from torch import Tensor

from .block import BlockConfig, Place, State


class Residual(BlockConfig):
    """``x + y``: experts' output is added. What every family of transformers does."""

    kind: Literal["residual"] = "residual"

    def join(self, x_TD: Tensor, y_TD: Tensor, state: State, place: Place) -> tuple[Tensor, State]:
        """Return the sum; nothing is carried."""
        return x_TD + y_TD, ()
