"""One optimizer step over the global batch.

L MoE layers, E experts.
"""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from ..errors import TrainingError
from ..moe.models.decoder import Decoder
from ..moe.routers.losses import auxiliary_losses
from ..parallel.dense.fsdp import ShardedMainGradients, shard_dense, without_reduction
from ..parallel.dense.gradients import MainGradients, wrap_dense
from ..parallel.mesh import Mesh
from .config import RunConfig
from .data.batches import Batches
from .objectives.next_token import NextToken
from .observers.phases import PhaseClock
from .optimizer import MasterAdamW, learning_rate
from .precision import DTYPES
from .setup import device, shards_dense


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step did; the same on every rank."""

    loss: float
    """Cross-entropy in nats per token of the global batch."""
    balance: float
    z: float
    grad_norm: float
    """Global norm before clipping."""
    lr: float
    counts_LE: Tensor
    """int64: routed rows of the global batch."""
    stop_requested: bool
    """True when some rank was asked to stop."""


class TrainStep:
    """Forward, backward, reduce, clip, update."""

    def __init__(
        self,
        config: RunConfig,
        decoder: Decoder,
        masters: dict[str, Tensor],
        batches: Batches,
        mesh: Mesh,
    ) -> None:
        self._config = config
        self._mesh = mesh
        self._batches = batches
        self._routers = decoder.routers()
        self._device = device()
        separates = config.train.packing == "documents"
        self.objective = NextToken(decoder, batches.eos_id if separates else None)
        if shards_dense(config, mesh):
            dtype = DTYPES[config.train.precision]
            shard_dense(self.objective, decoder, mesh, dtype, self._device)
            self.gradients: MainGradients = ShardedMainGradients(decoder, mesh)
            self._wrapped: nn.Module = self.objective
        else:
            self.gradients = MainGradients(decoder, mesh)
            sums_dense = self.gradients.sums_dense
            self._wrapped = self.objective if sums_dense else wrap_dense(self.objective, mesh)
        self.optimizer = MasterAdamW(decoder, masters, config.optimizer)
        self.phases = PhaseClock()

    def run(self, step: int, stop_requested: bool) -> StepResult:
        """Run step ``step`` (from 0). Raises :class:`TrainingError` when loss or gradient is not
        finite; the weights are then untouched."""
        sums, counts_LE = self._forward_backward(step)
        sums = self._mesh.sum(torch.cat([sums, sums.new_tensor([float(stop_requested)])]))
        cross_entropy, balance, z, stop = sums.tolist()
        train = self._config.train
        loss = cross_entropy / (train.batch_sequences * train.sequence_length)
        grad_norm = self.gradients.norm()
        if not (torch.isfinite(grad_norm) and torch.isfinite(sums).all()):
            raise TrainingError(
                f"step {step + 1} has loss {loss} and gradient norm {float(grad_norm)}, and "
                "nothing was updated; lower optimizer.lr or look at the data, then start again "
                "from the last checkpoint."
            )
        self.phases.lap("reduce")
        clip = self._config.optimizer.clip_norm
        self.gradients.scale_((clip / (grad_norm + 1e-6)).clamp(max=1.0))
        lr = learning_rate(self._config.optimizer, step, train.steps)
        self.optimizer.step(lr)
        if train.parameters != "lora":  # which leaves routers as they are
            for router, counts_E in zip(self._routers, counts_LE, strict=True):
                router.after_step(counts_E)
        self.phases.lap("optimizer")
        return StepResult(loss, balance, z, float(grad_norm), lr, counts_LE, stop > 0)

    def _forward_backward(self, step: int) -> tuple[Tensor, Tensor]:
        """Return fp64 ``[cross-entropy sum, balance, z]`` of this rank, and global counts."""
        train, mesh = self._config.train, self._mesh
        micro_rows = train.batch_sequences // train.accumulation
        rank_rows = micro_rows // mesh.world_size
        global_tokens = train.batch_sequences * train.sequence_length
        sums = torch.zeros(3, dtype=torch.float64)
        counts_LE = torch.zeros(0, dtype=torch.int64)
        self.gradients.zero()
        self.phases.lap("optimizer")
        for micro in range(train.accumulation):
            first = micro * micro_rows + mesh.rank * rank_rows
            windows = self._batches.sequences(step, range(first, first + rank_rows)).to(
                self._device
            )
            self.phases.lap("data")
            is_last = micro == train.accumulation - 1
            with nullcontext() if is_last else self._no_sync():
                part = self._wrapped(windows)
                loss = part.cross_entropy_sum / global_tokens
                parts = [part.cross_entropy_sum.detach()]
                if part.routings:
                    auxiliary = auxiliary_losses(part.routings, self._routers, mesh.sum)
                    loss = loss + auxiliary.total / train.accumulation
                    parts += [auxiliary.balance / train.accumulation]
                    parts += [auxiliary.z / train.accumulation]
                    micro_counts = auxiliary.counts_LE
                    counts_LE = micro_counts if micro == 0 else counts_LE + micro_counts
                self.phases.lap("forward")
                loss.backward()
            self.gradients.accumulate()
            sums[: len(parts)] += torch.stack([part.double() for part in parts]).cpu()
            self.phases.lap("backward")
        self.gradients.reduce()
        return sums, counts_LE.cpu()

    def _no_sync(self):  # type: ignore[no-untyped-def]
        if isinstance(self._wrapped, DistributedDataParallel):
            return self._wrapped.no_sync()
        if isinstance(self._wrapped, FSDPModule):
            return without_reduction(self._wrapped)
        return nullcontext()
