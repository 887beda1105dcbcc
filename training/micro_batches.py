"""The micro-batches of a step: their rows, their losses, and what they add up to.

L MoE layers, E experts.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from ..moe.models.model import Model
from ..moe.routers.loss_terms import GlobalCounts
from ..moe.routers.losses import add_counts, auxiliary_losses
from ..moe.routers.routing import Routing
from ..parallel.mesh import Mesh
from .config import RunConfig
from .device import device
from .objectives.objective import Objective
from .parallelize import Parallel
from .phases import PhaseClock


class MicroBatches:
    """Fetches this rank's rows of each micro-batch of a step, and keeps its losses and counts."""

    def __init__(
        self, config: RunConfig, decoder: Model, objective: Objective[Any], mesh: Mesh
    ) -> None:
        self.count = config.train.accumulation
        self.objective = objective
        self.device = device()
        self.mesh = mesh
        self.before_forward: list[Callable[[int, range], None]] = []
        """Called before each forward of a step with the step (from 0) and the rows of the global
        batch that it computes here."""
        self._rows = config.train.batch_sequences // self.count
        """Rows of the global batch in a micro-batch."""
        self._routers = decoder.routers()
        self._num_layers = len(decoder.config.moe_layers)
        self._step, self._divisor = 0, 1
        self._losses: list[Tensor] = []
        """Of micro-batches that :meth:`collect` has not read."""
        self.sums = self._zeros()
        """``[loss sum, balance, z]`` of this rank, and those of the objective's measures."""
        self.counts: list[GlobalCounts] = []
        """Those of the MoE layers of this rank, over the micro-batches so far."""
        self.router_weights: list[list[Tensor]] = []
        """Of each micro-batch and MoE layer, to name a layer that broke."""

    def begin(self, step: int) -> None:
        """Forget the last step."""
        self._step = step
        self._divisor = self.objective.divisor(step)
        self._losses, self.counts, self.router_weights = [], [], []
        self.sums = self._zeros()

    def fetch(self, number: int) -> Any:
        """Return this rank's rows of a micro-batch."""
        share = self._rows // self.mesh.dp_size
        first = number * self._rows + self.mesh.dp_rank * share
        rows = range(first, first + share)
        batch = self.objective.batch(self._step, rows, self.device)
        for tell in self.before_forward:
            tell(self._step, rows)
        return batch

    def loss(
        self,
        loss_sum: Tensor | None,
        routings: Sequence[Routing],
        measures: Mapping[str, Tensor] | None = None,
    ) -> Tensor | None:
        """Return the loss of a micro-batch with gradient, this rank's share of it.

        ``loss_sum`` is None in stages without the last layer. None if there is no loss at all.
        ``measures`` are sums over the targets of this rank.
        """
        loss = None if loss_sum is None else loss_sum / self._divisor
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        parts = [zero if loss_sum is None else loss_sum.detach(), zero, zero]
        parts += [zero if measures is None else measures[name] for name in self.objective.measures]
        if routings:
            self.router_weights.append([routing.weights_TK.detach() for routing in routings])
            sums = self.mesh.sum_of_stage
            auxiliary = auxiliary_losses(routings, self._routers, sums, self._num_layers)
            share = auxiliary.total / self.count
            loss = share if loss is None else loss + share
            parts[1:3] = [auxiliary.balance / self.count, auxiliary.z / self.count]
            self.counts = add_counts(self.counts, auxiliary.counts)
        self._losses.append(torch.stack([part.double() for part in parts]))
        return loss

    def _zeros(self) -> Tensor:
        num_sums = 3 + len(self.objective.measures)
        return torch.zeros(num_sums, dtype=torch.float64, device=self.device)

    def collect(self) -> None:
        """Add what micro-batches had in losses to ``sums``."""
        for parts in self._losses:
            self.sums += parts
        self._losses = []


class Passes(Protocol):
    """Runs forward and backward of all micro-batches of a step."""

    def run(self, phases: PhaseClock) -> None:
        """Run them; main gradients and the micro-batches' sums are then those of the step."""


class OneByOne:
    """Forward and backward of each micro-batch before the next: the whole model is here."""

    def __init__(self, micro_batches: MicroBatches, parallel: Parallel) -> None:
        self._micro_batches = micro_batches
        self._wrapped = parallel.wrapped
        self._engine = parallel.engine

    def run(self, phases: PhaseClock) -> None:
        """See :class:`Passes`."""
        count = self._micro_batches.count
        for number in range(count):
            batch = self._micro_batches.fetch(number)
            phases.lap("data")
            with nullcontext() if number == count - 1 else self._engine.accumulating():
                part = self._wrapped(batch)
                loss = self._micro_batches.loss(part.loss_sum, part.routings, part.measures)
                assert loss is not None
                phases.lap("forward")
                self._engine.backward(loss)
            self._micro_batches.collect()
            phases.lap("backward")
