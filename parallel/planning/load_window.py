"""The load of experts over the last steps, which predicts that of the next (Hecate: five steps).

W steps of the window, L MoE layers, E experts.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ...errors import CheckpointError

STEPS = 5


@dataclass(frozen=True, slots=True, eq=False)
class LoadWindow:
    """Counts of the last steps. A value: :meth:`after` returns the next one."""

    counts_WLE: Tensor
    """int64: rows of each expert, the oldest step first; at most ``steps`` of them."""
    steps: int = STEPS

    @classmethod
    def empty(cls, num_layers: int, num_experts: int, steps: int = STEPS) -> Self:
        """Return the window before the first step."""
        assert steps >= 1, "a window without steps"
        return cls(torch.zeros(0, num_layers, num_experts, dtype=torch.int64), steps)

    def after(self, counts_LE: Tensor) -> "LoadWindow":
        """Return the window after a step with these counts, which must be those of all ranks."""
        assert counts_LE.shape == self.counts_WLE.shape[1:], "counts of other layers or experts"
        newest = counts_LE.detach().to("cpu", torch.int64).unsqueeze(0)
        return LoadWindow(torch.cat([self.counts_WLE, newest])[-self.steps :], self.steps)

    def mean_LE(self) -> Tensor:
        """Return the mean rows per step, float64; zeros before the first step."""
        return self.counts_WLE.double().sum(dim=0) / max(1, len(self.counts_WLE))

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a checkpoint keeps: one int64 tensor of W * L * E counts."""
        return {"counts_WLE": self.counts_WLE}

    def with_state(self, state: dict[str, Tensor]) -> "LoadWindow":
        """Return the window that a checkpoint kept, cut to this one's steps.

        Raises :class:`CheckpointError` for counts of other layers or experts.
        """
        counts_WLE = state["counts_WLE"]
        if counts_WLE.shape[1:] != self.counts_WLE.shape[1:]:
            theirs, ours = list(counts_WLE.shape[1:]), list(self.counts_WLE.shape[1:])
            raise CheckpointError(
                f"the checkpoint has expert loads of {theirs} layers and experts, but the model "
                f"has {ours}; continue with the model that wrote it."
            )
        return LoadWindow(counts_WLE.to("cpu", torch.int64)[-self.steps :], self.steps)
