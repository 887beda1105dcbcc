"""Experts stored by channel, for inference. N rows, D model width, K choices."""

from torch import Tensor

from ...kernels.experts import expert_mlp
from ...kernels.values.channel_weights import ChannelExpertWeights
from ...kernels.values.row_channels import RowChannels
from ...kernels.waves import start_waves
from .base import LayerExperts


class ChannelExperts(LayerExperts):
    """Replaces :class:`Experts` on a CPU; all experts are in memory."""

    def __init__(self, weights: ChannelExpertWeights) -> None:
        super().__init__()
        self.weights = weights

    def extra_repr(self) -> str:
        """Say how many experts there are and of which size, for ``repr``."""
        num_slots, d_expert, d_model = self.weights.fc2_SFD.shape
        skips = "zeros" if self.weights.limits is None else "values below limits"
        return f"{num_slots} experts, d_model={d_model}, d_expert={d_expert}, {skips} are skipped"

    def forward(
        self,
        x_ND: Tensor,
        experts_NK: Tensor,
        weights_NK: Tensor,
        most_choices: int | None = None,
    ) -> Tensor:
        """Return the weighted sum of each row's experts, ``[N, D]``."""
        return expert_mlp(x_ND, experts_NK, weights_NK, self.weights)

    def by_channel(
        self, x_ND: Tensor, experts_NK: Tensor, weights_NK: Tensor, channels: RowChannels
    ) -> Tensor:
        """See :class:`LayerExperts`."""
        rows = (x_ND, experts_NK, weights_NK)
        waves = start_waves(*rows, self.weights.num_experts, channels)
        waves.add(self.weights)
        return waves.result()
