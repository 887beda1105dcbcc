"""The interface of a layer's routed experts. N rows, D model width, K choices."""

from torch import Tensor, nn

from ...kernels.values.row_channels import RowChannels
from ..adapters.rows import RowUpdates
from ..routers.routing import Routing


class LayerExperts(nn.Module):
    """The experts of one layer, in memory or elsewhere."""

    share_in_memory: float = 1.0
    """Share of the model's experts that memory has room for."""

    def announce(self, routing: Routing) -> None:
        """Start preparing the experts of the next forward, while other work runs first.

        By default nothing: experts in memory are always ready.
        """

    def keep(self, routing: Routing) -> None:
        """Protect the experts of the next forward, which follows immediately, from eviction.

        By default nothing: experts in memory stay there.
        """

    def gate_statistics(self) -> Tensor | None:
        """Return mean and variance of each expert's gate rows here, with gradient; see
        gate_statistics.py. None, by default, where weights are no parameters in memory."""
        return None

    def adapted(
        self, x_ND: Tensor, experts_NK: Tensor, weights_NK: Tensor, updates: RowUpdates
    ) -> Tensor:
        """Return what :meth:`forward` does, for inference, where some rows have an update.

        The other rows have the bits of :meth:`forward`.
        """
        raise NotImplementedError

    def by_channel(
        self, x_ND: Tensor, experts_NK: Tensor, weights_NK: Tensor, channels: RowChannels
    ) -> Tensor:
        """Return what :meth:`forward` does, for inference, where rows use some channels.

        Only for experts that are stored by channel.
        """
        raise NotImplementedError

    def forward(
        self,
        x_ND: Tensor,
        experts_NK: Tensor,
        weights_NK: Tensor,
        most_choices: int | None = None,
    ) -> Tensor:
        """Return the weighted sum of each row's experts, ``[N, D]``.

        At most ``most_choices`` of ``experts_NK`` are experts, where the caller knows; the others
        are -1. Kernels may then keep room for so many.
        """
        raise NotImplementedError
