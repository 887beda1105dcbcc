"""The linear layer of the decoder."""

from torch import Tensor, nn

from ..kernels.linear import linear


class Linear(nn.Linear):
    """A linear layer whose bf16 results do not depend on the other rows of a batch."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x @ weight.T + bias``, ``[T, out_features]``."""
        y = linear(x, self.weight)
        return y if self.bias is None else y + self.bias
