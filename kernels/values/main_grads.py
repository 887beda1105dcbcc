"""Where backward leaves the gradients of expert weights.

S slots, F expert width, H rows of fc1, D model width.
"""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class MainGrads:
    """Sums of weight gradients, in the parameters' type or wider. Backward adds to them instead of
    returning gradients: a new buffer per backward would cost as much memory as the weights."""

    fc1_SHD: Tensor | None
    """None, here and below, if the parameter is frozen or the experts do not have it."""
    fc2_SDF: Tensor | None
    _: KW_ONLY
    is_empty: bool = False
    """Whether the sums are still uninitialized memory. The first backward then writes instead of
    adding, which saves filling them with zeros."""
    fc1_bias_SH: Tensor | None = None
    fc2_bias_SD: Tensor | None = None

    @classmethod
    def empty_for(
        cls, parameters: Sequence[Tensor | None], wanted: Sequence[bool] = (True,) * 4
    ) -> "MainGrads":
        """Return empty sums like those of fc1, fc2 and their biases that are wanted."""
        sums = [
            torch.empty_like(part, memory_format=torch.contiguous_format)
            if part is not None and is_wanted
            else None
            for part, is_wanted in zip(parameters, wanted, strict=True)
        ]
        return cls.of(sums, is_empty=True)

    @classmethod
    def of(cls, totals: Sequence[Tensor | None], *, is_empty: bool = False) -> "MainGrads":
        """Return the sums of fc1, fc2 and their biases, if any."""
        fc1, fc2, bias1, bias2 = totals if len(totals) == 4 else (*totals, None, None)
        return cls(fc1, fc2, is_empty=is_empty, fc1_bias_SH=bias1, fc2_bias_SD=bias2)

    @property
    def totals(self) -> tuple[Tensor | None, ...]:
        """The sums in the order of :attr:`ExpertWeights.parameters`."""
        return self.fc1_SHD, self.fc2_SDF, self.fc1_bias_SH, self.fc2_bias_SD

    def begin_with_zeros(self) -> None:
        """Fill empty sums with zeros, for a backward that can only add."""
        if self.is_empty:
            for total in self.totals:
                if total is not None:
                    total.zero_()
            self.is_empty = False
