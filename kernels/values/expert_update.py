"""A served adapter's low-rank updates of the experts of one layer.

E experts, P rank, D model width, F expert width, H rows of fc1: 2F with a gate, F without.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class ExpertUpdate:
    """``W x + B (A x)`` for each expert; the factor s of LoRA is in B.

    Gate and up share an A: two updates of ranks p and q are one of rank p + q whose B has blocks.
    An expert without an update has zeros.
    """

    fc1_EPD: tuple[Tensor, Tensor] | None = None
    """A ``[E, P, D]`` and B ``[E, H, P]`` (gate rows first) of gate and up; None without any."""
    fc2_EPF: tuple[Tensor, Tensor] | None = None
    """A ``[E, P, F]`` and B ``[E, D, P]`` of down."""
