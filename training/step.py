"""One optimizer step over the global batch.

L MoE layers, E experts.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import TrainingError
from ..moe.models.decoder import Decoder
from ..moe.routers.loss_terms import GlobalCounts
from ..moe.routers.losses import add_counts, auxiliary_losses, on_host, stacked
from ..parallel.dense.expert_shards import ExpertShards
from ..parallel.mesh import Mesh
from .config import RunConfig
from .device import device
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


class TrainStep:
    """Forward, backward, reduce, clip, update."""

    def __init__(
        self,
        config: RunConfig,
        decoder: Decoder,
        objective: Objective,
        parallel: Parallel,
        mesh: Mesh,
    ) -> None:
        self._config = config
        self._mesh = mesh
        self._objective = objective
        self._wrapped = parallel.wrapped
        self._engine = parallel.engine
        self._copies = parallel.copies
        self.slices = parallel.slices
        self._routers = decoder.routers()
        self._layers = [index for index, _ in decoder.moe_layers()]
        self._router_weights: list[list[Tensor]] = []
        """Of each micro-batch and MoE layer of the step, to name a layer that broke."""
        self._device = device()
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
        self.before_forward: list[Callable[[int, range], None]] = []
        """Called before each forward of a step with the step (from 0) and the rows of the global
        batch that it computes here."""

    def run(self, step: int, stop_requested: bool) -> StepResult:
        """Run step ``step`` (from 0).

        Raises :class:`TrainingError` if loss or gradient is not finite; weights are then unchanged.
        """
        if self._copies is not None and self.ownership is not None:
            self.ownership.before_step(step)
            self._copies.begin_step(self._config.train.accumulation)
        sums, counts = self._forward_backward(step)
        sums = self._mesh.sum(torch.cat([sums, sums.new_tensor([float(stop_requested)])]))
        loss_sum, balance, z, stop = sums.tolist()
        train = self._config.train
        loss = loss_sum / self._objective.divisor(step)
        norm = self.gradients.norm()
        grad_norm = float(norm)  # the host waits for a GPU here, and not again in this step
        if not (math.isfinite(grad_norm) and torch.isfinite(sums).all()):
            raise TrainingError(
                f"step {step + 1} has loss {loss} and gradient norm {grad_norm}"
                f"{self._broken_router()}, and nothing was updated; lower optimizer.lr or look at "
                "the data, then start again from the last checkpoint."
            )
        self.phases.lap("reduce")
        clip = self._config.optimizer.clip_norm
        self.gradients.scale_((clip / (norm + 1e-6)).clamp(max=1.0))
        lr = learning_rate(self._config.optimizer, step, train.steps)
        self._engine.step(self.optimizer, lr)
        if train.parameters != "lora":  # lora freezes routers
            for router, layer in zip(self._routers, counts, strict=True):
                router.after_step(layer, counts)
        if self._copies is not None:
            self._copies.end_step(stacked(counts))
        if self.slices is not None:
            self.slices.after_step()
        self.phases.lap("optimizer")
        pairs = zip(self._routers, counts, strict=True)
        return StepResult(
            loss=loss,
            balance=balance,
            z=z,
            grad_norm=grad_norm,
            lr=lr,
            counts_LE=stacked(counts),
            dropped_L=tuple(router.dropped(layer) for router, layer in pairs),
            stop_requested=stop > 0,
        )

    def _broken_router(self) -> str:
        """Say which layer's router was the first to weigh by NaN or infinity, on any rank."""
        broken_L = torch.zeros(len(self._layers), dtype=torch.int64)
        for weights in self._router_weights:
            flags = [not bool(torch.isfinite(w).all()) for w in weights]
            broken_L += torch.tensor(flags, dtype=torch.int64)
        found = self._mesh.sum(broken_L).nonzero().flatten().tolist()
        return f", with NaN in the router of layer {self._layers[found[0]]}" if found else ""

    def _forward_backward(self, step: int) -> tuple[Tensor, list[GlobalCounts]]:
        """Return fp64 ``[loss sum, balance, z]`` of this rank, and each layer's global counts."""
        train, mesh = self._config.train, self._mesh
        micro_rows = train.batch_sequences // train.accumulation
        rank_rows = micro_rows // mesh.world_size
        divisor = self._objective.divisor(step)
        sums = torch.zeros(3, dtype=torch.float64, device=self._device)
        counts: list[GlobalCounts] = []
        self._router_weights = []
        self.gradients.zero()
        self.phases.lap("optimizer")
        for micro in range(train.accumulation):
            first = micro * micro_rows + mesh.rank * rank_rows
            rows = range(first, first + rank_rows)
            batch = self._objective.batch(step, rows, self._device)
            for tell in self.before_forward:
                tell(step, rows)
            self.phases.lap("data")
            is_last = micro == train.accumulation - 1
            with nullcontext() if is_last else self._engine.accumulating():
                part = self._wrapped(batch)
                loss = part.loss_sum / divisor
                parts = [part.loss_sum.detach()]
                if part.routings:
                    weights = [routing.weights_TK.detach() for routing in part.routings]
                    self._router_weights.append(weights)
                    auxiliary = auxiliary_losses(part.routings, self._routers, mesh.sum)
                    loss = loss + auxiliary.total / train.accumulation
                    parts += [auxiliary.balance / train.accumulation]
                    parts += [auxiliary.z / train.accumulation]
                    counts = add_counts(counts, auxiliary.counts)
                self.phases.lap("forward")
                self._engine.backward(loss)
            sums[: len(parts)] += torch.stack([part.double() for part in parts])
            self.phases.lap("backward")
        if self._copies is not None:
            self._copies.end_backward()
        self.gradients.reduce()
        return sums.cpu(), on_host(counts)
