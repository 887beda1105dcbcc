"""Cross-entropy of each text's label.

N rows, B texts, C labels.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import ConfigError
from ...kernels.values.memory import to_device
from ...moe.batch import Batch, batch_of_rows
from ...moe.config.encoder import EncoderConfig
from ...moe.config.model import LayersConfig
from ...moe.models.documents import batch_of_lengths
from ...moe.models.encoder import Encoder
from ...parallel.mesh import Mesh
from ..config import RunConfig
from ..data.labelled import LabelledData, build_labelled_data
from ..data.labelled_texts import TextRows
from ..stop import StopRequest
from .objective import HeldOut, MicroBatchLoss
from .sized import SizedObjective

log = logging.getLogger(__name__)


@dataclass(slots=True)
class ClassifiedBatch(MicroBatchLoss):
    """The result of one micro-batch, with what the model said."""

    said_B: Tensor
    """int64: the likeliest label of each text."""
    labels_B: Tensor
    """int64: its own label."""


class ClassifyLoss(nn.Module):
    """Cross-entropy of texts' labels; ``numbers`` are the head's rows of the data's labels."""

    def __init__(self, encoder: Encoder, numbers: Sequence[int]) -> None:
        super().__init__()
        self.encoder = encoder
        self._numbers_C = torch.tensor(numbers, dtype=torch.int64)

    def forward(self, rows: TextRows) -> ClassifiedBatch:
        """Score the texts of ``rows``."""
        here = self.encoder.device
        batch = _batch(rows).to(here)
        output = self.encoder(batch)
        logits_BC = self.encoder.logits(output.hidden_TD, rows.lengths)
        logits_BC = logits_BC.to(torch.promote_types(logits_BC.dtype, torch.float32))
        labels_B = to_device(self._numbers_C[rows.labels_C], here)
        loss = F.cross_entropy(logits_BC, labels_B, reduction="sum")
        said_B = logits_BC.detach().argmax(dim=1)
        return ClassifiedBatch(loss, len(labels_B), output.routings, said_B, labels_B)


class ClassifyObjective(SizedObjective[Encoder]):
    """Each text has one label, in training and in the held-out texts."""

    model_kinds = ("encoder",)
    data: LabelledData

    @classmethod
    def open_data(
        cls, config: RunConfig, folder: Path, mesh: Mesh, stop: StopRequest | None = None
    ) -> LabelledData:
        """Tokenize the texts and hold a part out."""
        return build_labelled_data(config, folder, mesh, stop)

    def complete_model(self, model: LayersConfig) -> LayersConfig:
        """Give the model the labels of the data, unless its own include them.

        Raises :class:`ConfigError` where ``model.labels`` lacks one. A head that comes with
        ``start_from`` is of another task then, and the labels of the data replace its labels.
        """
        assert isinstance(model, EncoderConfig), "check() compares the kinds"
        missing = [label for label in self.data.labels if label not in model.labels]
        if not missing:
            return model
        if model.labels and self.config.start_from is None:
            raise ConfigError(
                f"model.labels has no {missing[0]!r}, which is a label of the data; add it, or "
                "leave model.labels out."
            )
        if model.labels:
            log.warning(
                "the head of %s knows no label %r, so a new head for the %d labels of the data "
                "begins untrained.",
                self.config.start_from,
                missing[0],
                len(self.data.labels),
            )
        return model.model_copy(update={"labels": self.data.labels})

    def module(self, decoder: Encoder) -> nn.Module:
        """Return :class:`ClassifyLoss`."""
        labels = decoder.config.labels
        self._num_labels = len(labels)
        return ClassifyLoss(decoder, [labels.index(label) for label in self.data.labels])

    def batch(self, step: int, rows: range, device: torch.device) -> TextRows:
        """Return some texts of the global batch, on the host: the module counts and moves them."""
        return self.data.train.rows(self.data.train.at(step, rows))

    def divisor(self, step: int) -> int:
        """Return the texts of the global batch."""
        return self.config.train.batch_sequences

    def evaluate(self, module: nn.Module, mesh: Mesh) -> HeldOut:
        """Score ``eval_sequences`` held-out texts, split over the ranks."""
        held_out = self.data.held_out
        num_labels = self._num_labels
        counts_CC = torch.zeros(num_labels, num_labels, dtype=torch.float64)

        def part_of(texts: Sequence[int]) -> MicroBatchLoss:
            part: ClassifiedBatch = module(held_out.rows(list(texts)))
            pairs_B = part.labels_B.cpu() * num_labels + part.said_B.cpu()
            counted = torch.bincount(pairs_B, minlength=num_labels**2)
            counts_CC.add_(counted.view(num_labels, num_labels))
            return part

        loss, num_targets = self.score(part_of, module, len(held_out), mesh)
        counts_CC = mesh.sum(counts_CC)
        metrics = {
            "eval_loss": loss,
            "eval_accuracy": float(counts_CC.trace()) / num_targets,
            "eval_macro_f1": macro_f1(counts_CC),
        }
        return HeldOut(metrics, num_targets)


def macro_f1(counts_CC: Tensor) -> float:
    """Return the mean over labels of ``2 p r / (p + r)``, of precision and recall.

    ``counts_CC`` has how often texts of a label (row) were given a label (column). Labels that no
    text has and that none was given do not count.
    """
    right_C = counts_CC.diagonal()
    either_C = counts_CC.sum(dim=0) + counts_CC.sum(dim=1)
    occurs_C = either_C > 0
    return float((2 * right_C[occurs_C] / either_C[occurs_C]).mean())


def _batch(rows: TextRows) -> Batch:
    """Return the texts as sequences that begin at position 0."""
    if not rows.lengths:
        return batch_of_rows(rows.ids_N.new_empty(0, 1))  # this rank helps others' experts
    return batch_of_lengths(rows.ids_N, np.array(rows.lengths, dtype=np.int64))
