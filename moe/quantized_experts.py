"""Experts in 8 or 4 bits, for inference. N rows, D model width, K choices."""

from torch import Tensor

from ..kernels.expert_mlp import expert_mlp
from ..kernels.quantized_weights import QuantizedExpertWeights
from .experts import AnyExperts
from .routing import Routing


class QuantizedExperts(AnyExperts):
    """Takes the place of :class:`Experts`; all experts are in memory."""

    def __init__(self, weights: QuantizedExpertWeights) -> None:
        super().__init__()
        self.weights = weights

    def announce(self, routing: Routing) -> None:
        """Do nothing: experts in memory are always ready."""

    def keep(self, routing: Routing) -> None:
        """Do nothing: experts in memory stay there."""

    def forward(self, x_ND: Tensor, experts_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """Return the weighted sum of each row's experts, ``[N, D]``."""
        return expert_mlp(x_ND, experts_NK, weights_NK, self.weights)
