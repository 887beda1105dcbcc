"""Next-token cross-entropy of targets, given their sources.

S source rows, T target rows, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.values.memory import to_device
from ...moe.batch import Batch, batch_of_rows
from ...moe.config.encoder_decoder import EncoderDecoderConfig
from ...moe.config.model import LayersConfig
from ...moe.models.documents import batch_of_lengths
from ...moe.models.encoder_decoder import EncoderDecoder
from ...parallel.mesh import Mesh
from ..config import RunConfig
from ..data.pair_texts import PairRows
from ..data.pairs import PairData, build_pair_data
from ..stop import StopRequest
from .objective import HeldOut, MicroBatchLoss
from .sized import SizedObjective


@dataclass(slots=True)
class PairBatch(MicroBatchLoss):
    """The result of one micro-batch."""

    num_right: Tensor
    """int64: targets that the model found likeliest."""


class PairLoss(nn.Module):
    """Cross-entropy of each target's tokens, which are read one place later."""

    def __init__(self, model: EncoderDecoder) -> None:
        super().__init__()
        self.model = model
        start_id = model.config.start_id
        assert start_id is not None, "complete_model fills it in"
        self._start_id = start_id

    def forward(self, rows: PairRows) -> PairBatch:
        """Score the targets of ``rows``."""
        here = self.model.device
        source = _batch(rows.source_ids_S, rows.source_lengths).to(here)
        written = _batch(rows.target_ids_T, rows.target_lengths)
        read = replace(written, ids_T=_behind_start(written, self._start_id)).to(here)
        output = self.model((source, read))
        logits_TV = self.model.logits(output.hidden_TD)
        logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
        targets_T = to_device(rows.target_ids_T, here)
        loss = F.cross_entropy(logits_TV, targets_T, reduction="sum")
        num_right = (logits_TV.detach().argmax(dim=1) == targets_T).sum()
        return PairBatch(loss, len(targets_T), output.routings, num_right)


class PairsObjective(SizedObjective[EncoderDecoder]):
    """Every token of a target is one, the end of its text too."""

    model_kinds = ("encoder_decoder",)
    data: PairData

    @classmethod
    def open_data(
        cls, config: RunConfig, folder: Path, mesh: Mesh, stop: StopRequest | None = None
    ) -> PairData:
        """Tokenize the pairs and hold a part out."""
        return build_pair_data(config, folder, mesh, stop)

    def complete_model(self, model: LayersConfig) -> LayersConfig:
        """Give the model the id that ends a text as the one before targets, unless it has one."""
        assert isinstance(model, EncoderDecoderConfig), "check() compares the kinds"
        if model.start_id is not None:
            return model
        return model.model_copy(update={"start_id": self.data.tokenizer.eos_id})

    def module(self, decoder: EncoderDecoder) -> nn.Module:
        """Return :class:`PairLoss`."""
        return PairLoss(decoder)

    def batch(self, step: int, rows: range, device: torch.device) -> PairRows:
        """Return some pairs of the global batch, on the host: the module moves them."""
        return self.data.train.rows(self.data.train.at(step, rows))

    def divisor(self, step: int) -> int:
        """Return the target tokens of the global batch."""
        train = self.data.train
        pairs = train.at(step, range(self.config.train.batch_sequences))
        return sum(train.target_rows_C[pair] for pair in pairs)

    def evaluate(self, module: nn.Module, mesh: Mesh) -> HeldOut:
        """Score ``eval_sequences`` held-out pairs, split over the ranks."""
        held_out = self.data.held_out
        right = torch.zeros(1, dtype=torch.float64)

        def part_of(pairs: Sequence[int]) -> MicroBatchLoss:
            part: PairBatch = module(held_out.rows(list(pairs)))
            right.add_(part.num_right.cpu())
            return part

        loss, num_targets = self.score(part_of, module, len(held_out), mesh)
        accuracy = float(mesh.sum(right)) / num_targets
        return HeldOut({"eval_loss": loss, "eval_accuracy": accuracy}, num_targets)


def _batch(ids_N: Tensor, lengths: tuple[int, ...]) -> Batch:
    """Return texts as sequences that begin at position 0."""
    if not lengths:
        return batch_of_rows(ids_N.new_empty(0, 1))  # this rank helps others' experts
    return batch_of_lengths(ids_N, np.array(lengths, dtype=np.int64))


def _behind_start(batch: Batch, start_id: int) -> Tensor:
    """Return the id before each row of its text; ``start_id`` before the first."""
    before_T = batch.ids_T.roll(1)
    before_T[batch.positions_T == 0] = start_id
    return before_T
