"""The linear layer of the decoder."""

from torch import Tensor, nn

from ..kernels.linear import linear
from .adapters.rows import AdapterRows


class Linear(nn.Linear):
    """A linear layer whose bf16 results do not depend on the other rows of a batch."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias=bias)

    def forward(self, x: Tensor, adapters: AdapterRows | None = None) -> Tensor:
        """Return ``x @ weight.T + bias``, ``[T, out_features]``, with the adapters' updates."""
        y = linear(x, self.weight)
        if self.bias is not None:
            y = y + self.bias
        return y if adapters is None else adapters.add(self, x, y)


class FromZero(Linear):
    """A linear layer with a bias whose weights begin at zero, so that training decides its use."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=True)
