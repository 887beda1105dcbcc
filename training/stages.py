"""Training and evaluation where ranks hold stages of the model (``parallel.pp``).

T tokens, D model width.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..dtypes import torch_dtype
from ..errors import ConfigError
from ..moe.batch import Batch
from ..moe.models.decoder import Decoder
from ..moe.models.stage_rows import StageRows, types_between
from ..parallel.mesh import Mesh
from ..parallel.stages.pipeline import Pipeline, RowShape, with_loss
from ..parallel.stages.relay import receive, send
from .config import RunConfig
from .micro_batches import MicroBatches
from .objectives.objective import MicroBatchLoss, SplitLoss
from .parallelize import Parallel
from .phases import PhaseClock


class InStages:
    """Forward and backward of micro-batches that pass from stage to stage."""

    def __init__(
        self,
        config: RunConfig,
        decoder: Decoder,
        micro_batches: MicroBatches,
        parallel: Parallel,
        mesh: Mesh,
    ) -> None:
        """Make it. Raises :class:`ConfigError` if the objective's loss cannot be split."""
        self._gradients, self._micro_batches = parallel.engine.gradients, micro_batches
        self._stage = StageOfStep(splittable(parallel.wrapped), micro_batches)
        train = config.train
        sequences = train.batch_sequences // (train.accumulation * mesh.dp_size)
        model, stage, dtype = decoder.config, decoder.stage, torch_dtype(train.precision)
        self._pipeline = Pipeline(
            config.parallel.pp_schedule,
            self._stage,
            RowShape(
                sequences * train.sequence_length,
                model.d_model,
                types_between(model, stage.start, dtype),
                types_between(model, stage.stop, dtype),
            ),
            micro_batches.count,
            mesh,
            micro_batches.device,
            self._after_backward,
        )

    def run(self, phases: PhaseClock) -> None:
        """Run them all. Waits for other stages count as forward or backward."""
        self._stage.phases = phases
        self._pipeline.run()
        self._micro_batches.collect()
        phases.lap("backward")

    def _after_backward(self) -> None:
        self._gradients.accumulate()
        self._stage.phases.lap("backward")


class StageOfStep(nn.Module):
    """A stage's part of a micro-batch: rows in, and rows for the next stage or the loss out."""

    def __init__(self, loss: SplitLoss, micro_batches: MicroBatches) -> None:
        super().__init__()
        self._loss, self._micro_batches = loss, micro_batches
        self.phases = PhaseClock()

    def forward(self, *rows: Tensor, number: Tensor) -> tuple[Tensor, ...] | Tensor:
        """Run this stage's layers on micro-batch ``number``."""
        self.phases.lap("forward")  # the wait for the stage before
        given = self._micro_batches.fetch(int(number))
        self.phases.lap("data")
        decoder = self._loss.decoder
        before = StageRows.of(rows, decoder.config, decoder.stage.start) if rows else None
        output = decoder(self._loss.rows(given), before)
        if decoder.has_last_layer:
            part = self._loss.score(given, output)
            found = self._micro_batches.loss(part.loss_sum, part.routings, part.measures)
            assert found is not None
            self.phases.lap("forward")
            return found
        own = self._micro_batches.loss(None, output.routings)
        x_TD, *others = output.for_next_stage().tensors()
        self.phases.lap("forward")
        return with_loss(x_TD, own), *others


class RelayedLoss(nn.Module):
    """Scores a batch through all stages. The loss and its targets are in the last, 0 in others."""

    def __init__(self, loss: nn.Module, config: RunConfig, mesh: Mesh) -> None:
        super().__init__()
        self._loss, self._mesh = splittable(loss), mesh
        self._dtype = torch_dtype(config.train.precision)

    def forward(self, given: Any) -> MicroBatchLoss:
        """Return this rank's part of the loss, without gradient; all stages call it in turn."""
        decoder = self._loss.decoder
        batch = self._loss.rows(given)
        output = decoder(batch, self._before(decoder, batch))
        if decoder.has_last_layer:
            return self._loss.score(given, output)
        send(output.for_next_stage().tensors(), self._mesh)
        return MicroBatchLoss(torch.zeros((), dtype=torch.float64), 0, output.routings)

    def _before(self, decoder: Decoder, batch: Batch) -> StageRows | None:
        config, boundary = decoder.config, decoder.stage.start
        types = types_between(config, boundary, self._dtype)
        if not types:
            return None
        shape = (len(batch.ids_T), config.d_model)
        return StageRows.of(receive(types, shape, batch.ids_T.device, self._mesh), config, boundary)


def splittable(loss: nn.Module) -> SplitLoss:
    """Return ``loss``, or raise :class:`ConfigError` if it needs the whole decoder."""
    if isinstance(loss, SplitLoss):
        return loss
    raise ConfigError(
        f"parallel.pp is given, but {type(loss).__name__} is no SplitLoss, so its decoder cannot "
        "be split into stages; set parallel.pp to 1."
    )
