"""Next-token cross-entropy on what the assistant says (supervised fine-tuning).

N rows, M rows with a target, V vocabulary.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ...kernels.values.memory import to_device
from ...moe.batch import Batch, batch_of_rows
from ...moe.models.decoder import Decoder
from ...moe.models.documents import batch_of_lengths
from ...parallel.mesh import Mesh
from ..config import RunConfig
from ..data.chat import ChatData, build_chat_data
from ..data.chat_windows import ChatRows
from ..stop import StopRequest
from .objective import HeldOut, MicroBatchLoss
from .sized import SizedObjective


class ChatLoss(nn.Module):
    """Cross-entropy of the assistant's tokens; conversations do not see each other."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, rows: ChatRows) -> MicroBatchLoss:
        """Score the targets of ``rows``; the vocabulary's product is computed for them alone."""
        here = self.decoder.device
        output = self.decoder(_batch(rows).to(here))
        places_M = (rows.targets_N >= 0).nonzero().squeeze(1)
        logits_MV = self.decoder.logits(output.hidden_TD[to_device(places_M, here)])
        wide = torch.promote_types(logits_MV.dtype, torch.float32)
        targets_M = to_device(rows.targets_N[places_M], here)
        loss = F.cross_entropy(logits_MV.to(wide), targets_M, reduction="sum")
        return MicroBatchLoss(loss, len(targets_M), output.routings)


class ChatObjective(SizedObjective[Decoder]):
    """The assistant's tokens are targets, in training and in the held-out conversations."""

    data: ChatData

    @classmethod
    def open_data(
        cls, config: RunConfig, folder: Path, mesh: Mesh, stop: StopRequest | None = None
    ) -> ChatData:
        """Tokenize the conversations and hold a part out."""
        return build_chat_data(config, folder, mesh, stop)

    def module(self, decoder: Decoder) -> nn.Module:
        """Return :class:`ChatLoss`."""
        return ChatLoss(decoder)

    def batch(self, step: int, rows: range, device: torch.device) -> ChatRows:
        """Return the conversations of some windows of the global batch, on the host: the module
        counts and moves them."""
        return self.data.train.rows(self.data.train.at(step, rows))

    def divisor(self, step: int) -> int:
        """Return the assistant's tokens in the global batch."""
        return self.data.train.num_targets(step)

    def evaluate(self, module: nn.Module, mesh: Mesh) -> HeldOut:
        """Score ``eval_sequences`` held-out windows, split over the ranks."""
        held_out = self.data.held_out
        loss, num_targets = self.score(
            lambda windows: module(held_out.rows(list(windows))),
            module,
            len(held_out),
            mesh,
        )
        return HeldOut({"eval_loss": loss}, num_targets)


def _batch(rows: ChatRows) -> Batch:
    """Return the conversations as sequences that begin at position 0."""
    if not rows.lengths:
        return batch_of_rows(rows.ids_N.new_empty(0, 1))  # this rank helps others' experts
    return batch_of_lengths(rows.ids_N, np.array(rows.lengths, dtype=np.int64))
