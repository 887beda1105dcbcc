"""What training minimises.

B sequences, L tokens each, T = B*L, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...moe.batch import batch_of_rows
from ...moe.models.decoder import Decoder
from ...moe.models.documents import batch_of_documents
from ...moe.routers.routing import Routing


@dataclass(slots=True)
class MicroBatchLoss:
    """What one micro-batch gave on this rank."""

    cross_entropy_sum: Tensor
    """Summed over this rank's tokens, in nats, at least in fp32."""
    routings: list[Routing]


class NextToken(nn.Module):
    """Next-token cross-entropy of a decoder, in one forward (DDP wants a single entry).

    ``eos_id`` separates documents that must not see each other; None lets attention reach across
    whole windows.
    """

    def __init__(self, decoder: Decoder, eos_id: int | None = None) -> None:
        super().__init__()
        self.decoder = decoder
        self._eos_id = eos_id

    def forward(self, windows_BL1: Tensor) -> MicroBatchLoss:
        """Score int64 ``[B, L + 1]`` windows: the first L tokens predict the last L."""
        inputs_BL = windows_BL1[:, :-1]
        if self._eos_id is None:
            batch = batch_of_rows(inputs_BL)
        else:
            batch = batch_of_documents(inputs_BL, self._eos_id)
        output = self.decoder(batch)
        logits_TV = self.decoder.logits(output.hidden_TD)
        wide = torch.promote_types(logits_TV.dtype, torch.float32)
        targets_T = windows_BL1[:, 1:].reshape(-1)
        loss = F.cross_entropy(logits_TV.to(wide), targets_T, reduction="sum")
        return MicroBatchLoss(loss, output.routings)
