"""Experts in fewer bytes, for inference. N rows, D model width, K choices."""

from collections.abc import Callable

from torch import Tensor

from ...kernels.experts import expert_mlp
from ...kernels.values.group_sparse import GroupSparseExpertWeights
from ...kernels.values.quantized_weights import QuantizedExpertWeights
from ...kernels.values.two_of_four import TwoOfFourExpertWeights
from ..adapters.rows import RowUpdates
from .adapted import run_in_memory
from .base import LayerExperts


class QuantizedExperts(LayerExperts):
    """Replaces :class:`Experts`; all experts are in memory."""

    def __init__(
        self, weights: QuantizedExpertWeights | GroupSparseExpertWeights | TwoOfFourExpertWeights
    ) -> None:
        super().__init__()
        self.weights = weights

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedExperts":
        """Follow the module to a device; values and scales keep their types."""
        self.weights = self.weights.to(fn(self.weights.fc1.values[:0]).device)
        super()._apply(fn, recurse)
        return self

    def extra_repr(self) -> str:
        """Say how many experts there are and of which size, for ``repr``."""
        num_slots, d_model, _ = self.weights.fc2.values.shape
        d_expert, kind = self.weights.fc2.width, self.weights.fc1.kind
        return f"{num_slots} experts, d_model={d_model}, d_expert={d_expert}, {kind}"

    def adapted(
        self, x_ND: Tensor, experts_NK: Tensor, weights_NK: Tensor, updates: RowUpdates
    ) -> Tensor:
        """See :class:`LayerExperts`."""
        return run_in_memory(self, self.weights, (x_ND, experts_NK, weights_NK), updates)

    def forward(
        self,
        x_ND: Tensor,
        experts_NK: Tensor,
        weights_NK: Tensor,
        most_choices: int | None = None,
    ) -> Tensor:
        """Return the weighted sum of each row's experts, ``[N, D]``."""
        return expert_mlp(x_ND, experts_NK, weights_NK, self.weights)
