"""What training minimises.

B sequences, L tokens each, T = B*L, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..moe.batch import batch_of_rows
from ..moe.decoder import Decoder
from ..moe.routing import Routing


@dataclass(slots=True)
class MicroBatchLoss:
    """What one micro-batch gave on this rank."""

    cross_entropy_sum: Tensor
    """Summed over this rank's tokens, in nats, at least in fp32."""
    routings: list[Routing]


class NextToken(nn.Module):
    """Next-token cross-entropy of a decoder, in one forward (DDP wants a single entry)."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, windows_BL1: Tensor) -> MicroBatchLoss:
        """Score int64 ``[B, L + 1]`` windows: the first L tokens predict the last L."""
        output = self.decoder(batch_of_rows(windows_BL1[:, :-1]))
        logits_TV = self.decoder.logits(output.hidden_TD)
        wide = torch.promote_types(logits_TV.dtype, torch.float32)
        targets_T = windows_BL1[:, 1:].reshape(-1)
        loss = F.cross_entropy(logits_TV.to(wide), targets_T, reduction="sum")
        return MicroBatchLoss(loss, output.routings)
