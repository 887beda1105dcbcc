"""The interface of update rules: how some of a run's parameters follow their gradients.

A kind of optimizer has one rule for matrices inside layers and one for everything else (table.py).
optimizer.py keeps masters and state, names them for checkpoints and moves them with their experts.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from .held import Held


class UpdateRule(Protocol):
    """One way to update parameters."""

    def new_state(self, held: Held) -> dict[str, Tensor]:
        """Return the state of a parameter before the first step, by kind.

        Tensors have the master's type. Those of experts have a slot for each expert.
        """

    def steps_seen(self, held: Held, done: int) -> int:
        """Return how many updates the state has seen after ``done`` steps of the run."""

    def update(self, parameters: Sequence[Held], lr: float, done: int) -> None:
        """Update masters and state from the gradients, which stay as they are.

        ``done`` is the number of steps before this one.
        """
