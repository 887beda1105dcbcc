"""The interface of objectives: what a run minimises, on which data, and how it is judged.

A run calls ``open_data``, builds the model, creates the objective from the data and gets the
``module`` that scores the model from it. Every optimizer step gets ``batch`` and ``divisor``. A new
kind is one file and one line in table.py.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ...moe.batch import Batch
from ...moe.config.model import LayersConfig
from ...moe.models.decoder import Decoder, DecoderOutput
from ...moe.models.model import Model
from ...moe.routers.routing import Routing
from ...parallel.mesh import Mesh
from ..config import RunConfig
from ..data.data import Data
from ..stop import StopRequest

M = TypeVar("M", bound=Model)
MEASURED_STEPS = 8
"""Steps whose batches stand for all where :attr:`Objective.mean_rows` is asked for."""


@dataclass(slots=True)
class MicroBatchLoss:
    """The result of one micro-batch on this rank."""

    loss_sum: Tensor
    """Summed over this rank's targets, at least in fp32; for cross-entropy in nats."""
    num_targets: int
    routings: list[Routing]
    measures: Mapping[str, Tensor] = field(default_factory=dict, kw_only=True)
    """Sums over this rank's targets of :attr:`Objective.measures`, without gradient."""


class SplitLoss(nn.Module):
    """A loss of a decoder that may be split into stages.

    Runs with stages need it, because the loss is where the last layer is.
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def rows(self, batch: Any) -> Batch:
        """Return what the decoder computes for a batch, the same on all stages."""
        raise NotImplementedError

    def score(self, batch: Any, output: DecoderOutput) -> MicroBatchLoss:
        """Return the loss of a batch from the rows after the last layer."""
        raise NotImplementedError

    def forward(self, batch: Any) -> MicroBatchLoss:
        """Run the whole decoder and score its rows."""
        return self.score(batch, self.decoder(self.rows(batch)))


@dataclass(frozen=True, slots=True)
class HeldOut:
    """The result of an evaluation."""

    metrics: dict[str, float]
    """Values by their names in ``metrics.jsonl``; includes ``eval_loss``, unless what was
    chosen by ``train.eval_sequences`` has no target."""
    num_tokens: int


class Objective(ABC, Generic[M]):
    """One kind of objective, made for one run; M is the kind of model that it trains."""

    model_kinds: ClassVar[tuple[str, ...]] = ("decoder",)
    """Each ``model.kind`` that it trains."""

    measures: ClassVar[tuple[str, ...]] = ()
    """What each step measures besides the loss, by name: records have the means over the targets
    as ``train_NAME``."""

    def __init__(self, config: RunConfig, data: Data) -> None:
        self.config = config
        self.data = data

    @classmethod
    def check(cls, config: RunConfig) -> None:
        """Raise :class:`ConfigError` for a model of another kind."""
        if config.model.kind not in cls.model_kinds:
            raise ConfigError(
                f"data.format is {config.data.format}, which trains models of kind "
                f"{' or '.join(cls.model_kinds)}, but model.kind is {config.model.kind}; change "
                "one of them."
            )

    def complete_model(self, model: LayersConfig) -> LayersConfig:
        """Return the model's configuration with what the data decide, such as its labels."""
        return model

    @classmethod
    @abstractmethod
    def open_data(
        cls, config: RunConfig, folder: Path, mesh: Mesh, stop: StopRequest | None = None
    ) -> Data:
        """Prepare the data of a run in ``folder`` on rank 0, and open them on all ranks.

        Raises :class:`DataError` or :class:`ConfigError` if the data cannot be used, and
        :class:`Stopped` on all ranks if rank 0 is asked to stop.
        """

    @abstractmethod
    def module(self, decoder: M) -> nn.Module:
        """Return the module whose forward takes a batch and returns :class:`MicroBatchLoss`.

        One forward runs the whole model, because DDP and FSDP want a single entry. The module
        trains only the model's parameters. A :class:`SplitLoss` can also train in stages.
        """

    def before_training(self, module: nn.Module, mesh: Mesh, stop: StopRequest) -> None:
        """Compute what the run needs of the weights that it starts from; most need nothing.

        All ranks call this before a checkpoint is loaded, in a resumed run as well. ``module`` is
        the result of :meth:`module`. Raises :class:`Stopped` on all ranks if one is asked to stop.
        """

    @abstractmethod
    def batch(self, step: int, rows: range, device: torch.device) -> Any:
        """Return some rows of the global batch of ``step``, as the module takes it.

        The module computes on ``device``. Rows may be on the host, if the module moves them. A pure
        function of seed, step and rows; it does not depend on the number of ranks.
        """

    def window_rows(self, step: int, rows: range) -> list[int]:
        """Return how many rows the model computes for each of some rows of the global batch."""
        return [self.config.train.sequence_length] * len(rows)

    @property
    def window_length(self) -> int:
        """The most rows of a row of the global batch."""
        return self.config.train.sequence_length

    @abstractmethod
    def divisor(self, step: int) -> int:
        """Return the number of targets in the global batch of ``step``, the same on all ranks.

        Loss sums are divided by it, so that gradients are those of the mean over all ranks.
        """

    def num_tokens(self, steps: range) -> int:
        """Return the rows that the model computes for the global batches of ``steps``."""
        return len(steps) * self.config.train.batch_sequences * self.config.train.sequence_length

    @property
    def mean_rows(self) -> int:
        """About how many rows an MoE layer computes for a row of the global batch.

        The mean of the first steps. Where some layers read other rows than others, it is the mean
        of two such layers: those of sources and of targets.
        """
        count = MEASURED_STEPS * self.config.train.batch_sequences
        if not self.config.model.layers_share_rows:
            count *= 2
        return max(1, self.num_tokens(range(MEASURED_STEPS)) // count)

    @abstractmethod
    def evaluate(self, module: nn.Module, mesh: Mesh) -> HeldOut:
        """Evaluate the model on held-out data; all ranks call this and get the same result.

        ``module`` is the result of :meth:`module`. All ranks must run the same number of forwards,
        even with no rows, because experts on one rank serve tokens of another.
        """

    def held_out_windows(self, num_windows: int) -> list[int]:
        """Return which ``eval_sequences`` of ``num_windows`` windows are scored.

        They are spread evenly, because a text changes along its way.
        """
        count = min(self.config.train.eval_sequences, num_windows)
        return [place * num_windows // count for place in range(count)]

    def per_rank(self, mesh: Mesh) -> int:
        """Return the windows that a rank scores at a time: those of a micro-batch."""
        train = self.config.train
        return max(1, train.batch_sequences // (train.accumulation * mesh.dp_size))

    def score(
        self,
        part_of: Callable[[Sequence[int]], MicroBatchLoss],
        module: nn.Module,
        num_windows: int,
        mesh: Mesh,
    ) -> tuple[float, int]:
        """Return the mean loss of held-out windows, NaN without a target, and their targets.

        Splits :meth:`held_out_windows` over the ranks; ``part_of`` scores some of them, or none, by
        ``module``.
        """
        chosen = self.held_out_windows(num_windows)
        count, per_rank = len(chosen), self.per_rank(mesh)
        sums = torch.zeros(2, dtype=torch.float64)  # loss, targets
        module.eval()
        with torch.no_grad():
            for start in range(0, count, per_rank * mesh.dp_size):
                first = start + mesh.dp_rank * per_rank
                part = part_of(chosen[first : first + per_rank])
                sums += torch.tensor([float(part.loss_sum), part.num_targets], dtype=torch.float64)
        module.train()
        loss_sum, num_targets = mesh.sum(sums).tolist()
        return loss_sum / num_targets if num_targets else math.nan, int(num_targets)
