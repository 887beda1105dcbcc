"""Dense parameters whole on every rank: DDP, and the case of one process.

If all ranks are on one host, main gradients lie in shared memory and are summed there after
backward (gradients.py). DDP would have nothing to do and is not used. With a queue, DDP sends
nothing either: it says which gradients are there (gradient_queue.py).
"""

from collections.abc import Set
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..mesh import Mesh
from .engine import Clip, Optimizer
from .gradient_queue import GradientQueue
from .gradients import MainGradients, expert_parameter_names

QUEUED_BUCKET_MB: float = 1
"""Small, so that gradients are in the queue soon after they exist."""


class Replicated:
    """See :class:`~moeyard.parallel.dense.engine.DenseEngine`."""

    gradients: MainGradients

    def __init__(self, mesh: Mesh, *, has_queue: bool = False) -> None:
        self._mesh, self._has_queue = mesh, has_queue
        self.queue: GradientQueue | None = None
        self._ddp: DistributedDataParallel | None = None

    def place(self, model: nn.Module, device: torch.device) -> None:
        """Move the whole model."""
        model.to(device)

    def own_masters(self, model: nn.Module) -> Set[str]:
        """Return nothing: the optimizer keeps a master of every narrowed parameter."""
        return frozenset()

    def wrap(
        self, objective: nn.Module, model: nn.Module, dtype: torch.dtype, device: torch.device
    ) -> nn.Module:
        """Wrap ``objective`` in DDP if DDP has dense parameters to reduce."""
        self.gradients = MainGradients(model, self._mesh)
        has_dense = bool(self.gradients.dense)
        if self._mesh.dp_group is None or self.gradients.sums_dense or not has_dense:
            return objective
        group = self._mesh.dp_group
        if self._has_queue:
            self.queue = GradientQueue(partial(dist.all_reduce, group=group, async_op=True))
        self._ddp = _wrap_in_ddp(objective, group, self.queue)
        return self._ddp

    def accumulating(self) -> AbstractContextManager[object]:
        """Keep DDP from reducing its buckets."""
        if self._ddp is None:
            return nullcontext()
        return self._ddp.no_sync()

    def backward(self, loss: Tensor) -> None:
        """Run backward and move its gradients into main gradients."""
        queue = self.queue
        is_summed = self._ddp is not None and self._ddp.require_backward_grad_sync
        with queue.sends_all() if queue is not None and is_summed else nullcontext():
            loss.backward()
        self.gradients.accumulate()

    def step(self, optimizer: Optimizer, lr: float, clip: Clip) -> None:
        """Update what this rank holds; dense parameters stay the same on all ranks."""
        self.gradients.scale_(clip(self.gradients.norm()))
        optimizer.step(lr)


def _wrap_in_ddp(
    objective: nn.Module, group: dist.ProcessGroup, queue: GradientQueue | None
) -> DistributedDataParallel:
    """Wrap everything except experts; main gradients are already attached.

    In the synchronising backward, each bucket adds this micro-batch to its main gradients. They are
    summed over all ranks at once, or go to ``queue``.
    """
    ignored = [*expert_parameter_names(objective), *(n for n, _ in objective.named_buffers())]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(objective, ignored)
    bucket_mb = None if queue is None else QUEUED_BUCKET_MB
    wrapped = DistributedDataParallel(objective, process_group=group, bucket_cap_mb=bucket_mb)
    if queue is None:
        wrapped.register_comm_hook(group, _sum_main_gradients)
    else:
        wrapped.register_comm_hook(queue, _queue_main_gradients)
    return wrapped


def _add_to_main_gradients(
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> list[Tensor]:
    main = [parameter.main_grad for parameter in bucket.parameters()]  # type: ignore[attr-defined]
    for main_grad, grad in zip(main, bucket.gradients(), strict=True):
        main_grad.add_(grad)
        grad.zero_()  # so that accumulate() does not add it again
    return main


def _sum_main_gradients(
    group: dist.ProcessGroup,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[Tensor]:
    main = _add_to_main_gradients(bucket)
    flat = torch.cat([main_grad.reshape(-1) for main_grad in main])
    work = dist.all_reduce(flat, group=group, async_op=True)

    def write_back(_: torch.futures.Future) -> Tensor:
        for main_grad, part in zip(main, flat.split([m.numel() for m in main]), strict=True):
            main_grad.copy_(part.view_as(main_grad))
        return bucket.buffer()

    return work.get_future().then(write_back)


def _queue_main_gradients(
    queue: GradientQueue,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[Tensor]:
    """Queue a bucket; DDP has nothing to wait for."""
    queue.add(_add_to_main_gradients(bucket))
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done
