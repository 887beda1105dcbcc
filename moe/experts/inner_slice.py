"""A slice of the inner width of experts, for expert tensor parallelism.

An expert is a sum over its inner width: ``W2 (act(W_gate x) * W_up x) + b2``. A process that has
some of the F rows of gate (if there is one) and up, and the same columns of W2, computes some of
the terms. Slice 0 also adds ``b2``; the others have zeros in its place, which do not train.

S slots, D model width, F expert width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class InnerSlice:
    """Which of ``count`` equal slices a process has."""

    index: int
    count: int
    fc1_parts: int = 2
    """Equal parts of fc1's rows: gate and up, or 1 for up alone."""

    def holds(self, name: str) -> bool:
        """Say whether parameter ``name`` of the experts is a part of the whole one here."""
        return name != "fc2_bias" or self.index == 0

    def cut(self, name: str, whole: Tensor) -> Tensor:
        """Return the slice of a parameter of all slots, in memory of its own."""
        if name == "fc2_bias":
            return whole.clone() if self.index == 0 else torch.zeros_like(whole)
        if name == "fc2":
            return self._part(whole, dim=2).clone(memory_format=torch.contiguous_format)
        parts = whole.chunk(self.fc1_parts, dim=1)
        return torch.cat([self._part(part, dim=1) for part in parts], dim=1)

    def whole_shape(self, name: str, part: Tensor) -> Shape:
        """Return the shape of one expert's whole parameter, of which ``part`` is here."""
        dim = self._dim(name)
        if dim is None:
            return tuple(part.shape)
        return tuple(n * self.count if d == dim else n for d, n in enumerate(part.shape))

    def pieces(self, name: str, part: Tensor) -> list[tuple[Shape, Tensor]]:
        """Return views of one expert's parameter and where each begins in the whole one."""
        dim = self._dim(name)
        if dim is None:
            return [((0,) * part.ndim, part)]
        # fc1 has the gate's rows and the up rows.
        views = part.chunk(self.fc1_parts, dim=0) if name.startswith("fc1") else (part,)
        width = views[0].shape[dim]
        starts = (number * width * self.count + self.index * width for number in range(len(views)))
        return [
            (tuple(start if d == dim else 0 for d in range(part.ndim)), view)
            for start, view in zip(starts, views, strict=True)
        ]

    def _part(self, whole: Tensor, dim: int) -> Tensor:
        return whole.chunk(self.count, dim=dim)[self.index]

    def _dim(self, name: str) -> int | None:
        """Return the dimension of one expert's parameter that is cut, None for none."""
        return {"fc1": 0, "fc1_bias": 0, "fc2": 1, "fc2_bias": None}[name]
