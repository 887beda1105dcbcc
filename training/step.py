"""One optimizer step over the global batch.

L MoE layers, E experts.
"""

import math
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import TrainingError
from ..moe.models.decoder import Decoder
from ..moe.models.model import Model
from ..moe.routers.loss_terms import GlobalCounts
from ..moe.routers.losses import on_host, stacked
from ..parallel.dense.expert_shards import ExpertShards
from ..parallel.mesh import Mesh
from .config import RunConfig
from .micro_batches import MicroBatches, OneByOne, Passes
from .objectives.objective import Objective
from .optimizers.table import open_optimizer
from .ownership import Ownership, planned_owners
from .parallelize import Parallel
from .phases import PhaseClock
from .schedule import learning_rate


@dataclass(frozen=True, slots=True)
class StepResult:
    """The result of a step; the same on every rank."""

    loss: float
    """Mean per target of the global batch; cross-entropy is in nats."""
    balance: float
    z: float
    grad_norm: float
    """Global norm before clipping."""
    lr: float
    counts_LE: Tensor
    """int64: routed rows of the global batch."""
    dropped_L: tuple[int, ...]
    """Choices of the global batch that reached no expert, per MoE layer."""
    stop_requested: bool
    """True when some rank was asked to stop."""
    measures: dict[str, float] = field(default_factory=dict)
    """Means per target of what the objective measures besides the loss."""


class TrainStep:
    """Forward, backward, reduce, clip, update."""

    def __init__(
        self,
        config: RunConfig,
        decoder: Model,
        objective: Objective[Any],
        parallel: Parallel,
        mesh: Mesh,
    ) -> None:
        self._config = config
        self._mesh = mesh
        self._objective = objective
        self._engine = parallel.engine
        self._copies = parallel.copies
        self.slices = parallel.slices
        self._routers = decoder.routers()
        self._layers = [index for index, _ in decoder.routed_layers()]
        self._num_layers = decoder.config.num_layers
        self._grad_norm = 0.0
        """Of the last step, before clipping."""
        self.gradients = parallel.engine.gradients
        if config.optimizer.shard_experts:
            self.gradients.shards = ExpertShards.of(decoder, mesh)
        self.optimizer = open_optimizer(
            config.optimizer,
            decoder,
            parallel.masters,
            mesh,
            config.seed,
            self.gradients.shards,
            config.train.sparse_experts,
        )
        self.ownership: Ownership | None = None
        """Who moves experts between ranks, if the run has copies."""
        if self._copies is not None:
            assert mesh.ep_group is not None and config.parallel.copies is not None
            options = config.parallel.copies
            model = (self._copies, self.optimizer, self.gradients)
            self.ownership = Ownership(*model, mesh.ep_group, options.reshard_every)
            if options.plan is not None:
                owners = planned_owners(Path(options.plan), decoder.config, mesh)
                self.ownership.move_to(owners)
        self.phases = PhaseClock()
        self._micro_batches = MicroBatches(config, decoder, objective, mesh)
        self.before_forward = self._micro_batches.before_forward
        """See :class:`MicroBatches`."""
        self._passes = self._open_passes(decoder, parallel)

    def run(self, step: int, stop_requested: bool) -> StepResult:
        """Run step ``step`` (from 0).

        Raises :class:`TrainingError` if loss or gradient is not finite; weights are then unchanged.
        """
        if self._copies is not None and self.ownership is not None:
            self.ownership.before_step(step)
            self._copies.begin_step(self._config.train.accumulation)
        sums = self._forward_backward(step)
        sums = self._mesh.sum(torch.cat([sums, sums.new_tensor([float(stop_requested)])]))
        loss_sum, balance, z, *measured, stop = sums.tolist()
        train = self._config.train
        divisor = self._objective.divisor(step)
        loss = loss_sum / divisor
        lr = learning_rate(self._config.optimizer, step, train.steps)
        self._engine.step(self.optimizer, lr, partial(self._clip, step, loss, sums))
        here = on_host(self._micro_batches.counts)
        counts, dropped = self._of_all_layers(here)
        if train.parameters != "lora":  # lora freezes routers
            for router, layer in zip(self._routers, here, strict=True):
                router.after_step(layer, counts)
        if self._copies is not None:
            self._copies.end_step(stacked(counts))
        if self.slices is not None:
            self.slices.after_step()
        self.phases.lap("optimizer")
        return StepResult(
            loss=loss,
            balance=balance,
            z=z,
            grad_norm=self._grad_norm,
            lr=lr,
            counts_LE=stacked(counts),
            dropped_L=dropped,
            stop_requested=stop > 0,
            measures={
                name: value / divisor
                for name, value in zip(self._objective.measures, measured, strict=True)
            },
        )

    def _clip(self, step: int, loss: float, sums: Tensor, grad_norm: Tensor) -> Tensor:
        """Return by what to multiply gradients of this norm; raise if a number is not finite."""
        self._grad_norm = float(grad_norm)  # the host waits for a GPU, and not again in this step
        if not (math.isfinite(self._grad_norm) and torch.isfinite(sums).all()):
            raise TrainingError(
                f"step {step + 1} has loss {loss} and gradient norm {self._grad_norm}"
                f"{self._broken_router()}, and nothing was updated; lower optimizer.lr or look at "
                "the data, then start again from the last checkpoint."
            )
        self.phases.lap("reduce")
        return (self._config.optimizer.clip_norm / (grad_norm + 1e-6)).clamp(max=1.0)

    def _open_passes(self, decoder: Model, parallel: Parallel) -> Passes:
        if self._mesh.pp_size == 1:
            return OneByOne(self._micro_batches, parallel)
        from .stages import InStages  # torch's pipelining takes a second to import

        assert isinstance(decoder, Decoder), "stages_check.py refuses others"
        return InStages(self._config, decoder, self._micro_batches, parallel, self._mesh)

    def _of_all_layers(
        self, here: list[GlobalCounts]
    ) -> tuple[list[GlobalCounts], tuple[int, ...]]:
        """Return the counts of all MoE layers of the model, and the choices that they dropped."""
        pairs = zip(self._routers, here, strict=True)
        found = self._mesh.of_all_stages(
            [(layer, router.dropped(layer)) for router, layer in pairs]
        )
        return [layer for layer, _ in found], tuple(dropped for _, dropped in found)

    def _broken_router(self) -> str:
        """Say which layer's router was the first to weigh by NaN or infinity, on any rank."""
        broken_L = torch.zeros(self._num_layers, dtype=torch.int64)
        for weights in self._micro_batches.router_weights:
            for layer, weights_TK in zip(self._layers, weights, strict=True):
                broken_L[layer] += not bool(torch.isfinite(weights_TK).all())
        found = self._mesh.sum(broken_L).nonzero().flatten().tolist()
        return f", with NaN in the router of layer {found[0]}" if found else ""

    def _forward_backward(self, step: int) -> Tensor:
        """Run the micro-batches; return this rank's sums: :attr:`MicroBatches.sums`."""
        self._micro_batches.begin(step)
        self.gradients.zero()
        self.phases.lap("optimizer")
        self._passes.run(self.phases)
        if self._copies is not None:
            self._copies.end_backward()
        self.gradients.reduce()
        return self._micro_batches.sums.cpu()
