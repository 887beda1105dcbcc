"""Next-token cross-entropy on text.

B sequences, L tokens each, T = B*L, V vocabulary.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.values.memory import to_device
from ...moe.batch import Batch, batch_of_rows
from ...moe.models.decoder import Decoder, DecoderOutput
from ...moe.models.documents import batch_of_documents
from ...parallel.mesh import Mesh
from ..config import RunConfig
from ..data.text import TextData, build_data
from ..stop import StopRequest
from .objective import HeldOut, MicroBatchLoss, Objective, SplitLoss


class NextToken(SplitLoss):
    """Next-token cross-entropy of a decoder, in one forward because DDP wants a single entry.

    ``eos_id`` separates documents that must not see each other; with None attention spans whole
    windows.
    """

    def __init__(self, decoder: Decoder, eos_id: int | None = None) -> None:
        super().__init__(decoder)
        self._eos_id = eos_id

    def rows(self, windows_BL1: Tensor) -> Batch:
        """Return the inputs of int64 ``[B, L + 1]`` windows: their first L tokens.

        Windows may be on the host, where documents are counted.
        """
        here = self.decoder.device
        inputs_BL = windows_BL1[:, :-1]
        if self._eos_id is None:
            return batch_of_rows(inputs_BL).to(here)
        return batch_of_documents(inputs_BL, self._eos_id).to(here)

    def score(self, windows_BL1: Tensor, output: DecoderOutput) -> MicroBatchLoss:
        """Score the last L tokens of each window."""
        here = output.hidden_TD.device
        logits_TV = self.decoder.logits(output.hidden_TD)
        wide = torch.promote_types(logits_TV.dtype, torch.float32)
        targets_T = to_device(windows_BL1[:, 1:].reshape(-1), here)
        loss = F.cross_entropy(logits_TV.to(wide), targets_T, reduction="sum")
        return MicroBatchLoss(loss, len(targets_T), output.routings)


class NextTokenObjective(Objective[Decoder]):
    """Every token of the text is a target; held-out text is also scored per byte."""

    data: TextData

    @classmethod
    def open_data(
        cls, config: RunConfig, folder: Path, mesh: Mesh, stop: StopRequest | None = None
    ) -> TextData:
        """Tokenize the source, or stream it, and hold a part out."""
        return build_data(config, folder, mesh, stop)

    def module(self, decoder: Decoder) -> nn.Module:
        """Return :class:`NextToken`, which separates documents as ``train.packing`` says."""
        separates = self.config.train.packing == "documents"
        return NextToken(decoder, self.data.train.eos_id if separates else None)

    def batch(self, step: int, rows: range, device: torch.device) -> Tensor:
        """Return int64 windows ``[len(rows), L + 1]``, on the host: the module moves them."""
        return self.data.train.sequences(step, rows)

    def divisor(self, step: int) -> int:
        """Return ``B * L``: windows have no padding."""
        return self.config.train.batch_sequences * self.config.train.sequence_length

    def evaluate(self, module: nn.Module, mesh: Mesh) -> HeldOut:
        """Score ``eval_sequences`` held-out windows, split over the ranks."""
        held_out = self.data.held_out
        loss, num_targets = self.score(
            lambda windows: module(held_out.in_order(windows)),
            module,
            len(held_out),
            mesh,
        )
        per_byte = loss * self.data.tokens_per_byte
        return HeldOut({"eval_loss": loss, "eval_loss_per_byte": per_byte}, num_targets)
