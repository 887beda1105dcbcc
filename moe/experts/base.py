"""What a layer asks of its routed experts. N rows, D model width, K choices."""

from torch import Tensor, nn

from ..routers.routing import Routing


class LayerExperts(nn.Module):
    """The experts of one layer, wherever they are."""

    def announce(self, routing: Routing) -> None:
        """Learn what the next forward will need, before other work that leads there."""
        raise NotImplementedError

    def keep(self, routing: Routing) -> None:
        """Hold on to what the next forward needs, which follows immediately."""
        raise NotImplementedError

    def forward(self, x_ND: Tensor, experts_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """Return the weighted sum of each row's experts, ``[N, D]``."""
        raise NotImplementedError
