"""Next-token cross-entropy on what the assistant says (supervised fine-tuning).

N rows, M rows with a target, V vocabulary.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...moe.batch import Batch, batch_of_rows
from ...moe.models.decoder import Decoder
from ...moe.models.documents import pack
from ...parallel.mesh import Mesh
from ..config import RunConfig
from ..data.chat import ChatData, build_chat_data
from ..data.chat_windows import ChatRows
from ..device import device
from ..stop import StopRequest
from .objective import HeldOut, MicroBatchLoss, Objective


class ChatLoss(nn.Module):
    """Cross-entropy of the assistant's tokens; conversations do not see each other."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, rows: ChatRows) -> MicroBatchLoss:
        """Score the targets of ``rows``; the vocabulary's product is computed for them alone."""
        output = self.decoder(_batch(rows))
        has_target_N = rows.targets_N >= 0
        logits_MV = self.decoder.logits(output.hidden_TD[has_target_N])
        wide = torch.promote_types(logits_MV.dtype, torch.float32)
        targets_M = rows.targets_N[has_target_N]
        loss = F.cross_entropy(logits_MV.to(wide), targets_M, reduction="sum")
        return MicroBatchLoss(loss, len(targets_M), output.routings)


class ChatObjective(Objective):
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
        """Return the conversations of some windows of the global batch."""
        return _on(device, self.data.train.rows(self.data.train.at(step, rows)))

    def divisor(self, step: int) -> int:
        """Return the assistant's tokens in the global batch."""
        return self.data.train.num_targets(step)

    def num_tokens(self, steps: range) -> int:
        """Return the rows of the global batches; windows are not filled up."""
        return self.data.train.num_rows(steps)

    def evaluate(self, module: nn.Module, mesh: Mesh) -> HeldOut:
        """Score the first ``eval_sequences`` held-out windows, split over the ranks."""
        train, held_out = self.config.train, self.data.held_out
        num_windows = min(train.eval_sequences, len(held_out))
        per_rank = max(1, train.batch_sequences // (train.accumulation * mesh.world_size))
        sums = torch.zeros(2, dtype=torch.float64)  # loss, targets
        module.eval()
        with torch.no_grad():
            for start in range(0, num_windows, per_rank * mesh.world_size):
                first = min(num_windows, start + mesh.rank * per_rank)
                windows = list(range(first, min(num_windows, first + per_rank)))
                part = module(_on(device(), held_out.rows(windows)))
                sums += torch.tensor([float(part.loss_sum), part.num_targets], dtype=torch.float64)
        module.train()
        loss_sum, num_targets = mesh.sum(sums).tolist()
        return HeldOut({"eval_loss": loss_sum / num_targets}, int(num_targets))


def _on(target: torch.device, rows: ChatRows) -> ChatRows:
    return ChatRows(rows.ids_N.to(target), rows.targets_N.to(target), rows.lengths)


def _batch(rows: ChatRows) -> Batch:
    """Return the conversations as sequences that begin at position 0."""
    if not rows.lengths:
        return batch_of_rows(rows.ids_N.new_empty(0, 1))  # this rank helps others' experts
    lengths = np.array(rows.lengths, dtype=np.int64)
    starts = np.cumsum(lengths) - lengths
    positions_N: Tensor = torch.from_numpy(np.arange(lengths.sum()) - np.repeat(starts, lengths))
    place = rows.ids_N.device
    return Batch(
        ids_T=rows.ids_N,
        positions_T=positions_N.to(place),
        lengths=rows.lengths,
        packing=pack(starts, lengths, place),
    )
