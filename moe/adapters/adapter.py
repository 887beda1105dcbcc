"""A served adapter (LoRA, Hu et al. 2021): updates of one decoder's layers, next to its weights.

O outputs, I inputs, P rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count

from torch import Tensor, nn

from ...kernels.linear import linear
from ...kernels.values.expert_update import ExpertUpdate
from .routed import RoutedUpdate


@dataclass(frozen=True, slots=True)
class LowRankLinear:
    """``W x + B (A x)`` of a linear layer; the factor s of LoRA is in B."""

    a_PI: Tensor
    b_OP: Tensor

    def run(self, x_NI: Tensor) -> Tensor:
        """Return ``B (A x)``, ``[N, O]``; in bf16 a row's bits do not depend on the others."""
        return linear(linear(x_NI, self.a_PI), self.b_OP)


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """An adapter, bound to the modules of one decoder. It never changes, so requests may hold it.

    The decoder does not know its adapters: batches bring them (:class:`.rows.AdapterRows`).
    """

    name: str
    linears: Mapping[nn.Module, LowRankLinear]
    """Updates of linear layers."""
    experts: Mapping[nn.Module, ExpertUpdate]
    """Updates of the routed experts of layers, by the module that holds or reads the experts."""
    in_attention: bool
    """Whether any of ``linears`` is in attention, whose fast kernels read weights alone."""
    mlps: Mapping[nn.Module, RoutedUpdate] = field(default_factory=dict)
    """LoRA experts of dense MLPs."""
    number: int = field(default_factory=count().__next__)
    """Tells adapters of this process apart, also one that was loaded again under its old name."""
