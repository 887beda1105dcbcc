"""Dense parameters sharded over all ranks with FSDP2, instead of replicated under DDP.

Each decoder layer is one FSDP unit, gathered for its forward and again for its backward. The
embeddings, the last norm and the head belong to the root unit. A rank keeps its rows of every
dense parameter in fp32 (fp64 for fp64 runs). These rows are the master weights; gradients and
Adam's moments have the same shape. Under bf16 a unit is cast when it is gathered. At the start
every rank builds the whole dense weights on the host once. Tested with gloo on CPUs, not yet with
NCCL.

Two kinds of parameter stay outside. Experts are already split over ``ep`` and are reduced over
``edp``. Routers stay whole on every rank, for three reasons:

- a unit has one type, and routers are fp32 under bf16;
- ``route`` calls them where their look-ahead says, perhaps outside their layer's forward;
- with E x D entries a layer they are too small to be worth separate collectives.
"""

from collections.abc import Iterator, Set
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from ...moe.experts.resident import Experts
from ...moe.models.model import Model
from ...moe.routers.router import Router
from ..mesh import Mesh
from .engine import Clip, Optimizer
from .gradient_queue import GradientQueue
from .gradients import MainGradients, attach
from .part_gradients import PartMainGradients


class Sharded:
    """See :class:`~moeyard.parallel.dense.engine.DenseEngine`; needs a process group."""

    gradients: MainGradients

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self.queue: GradientQueue | None = None

    def place(self, model: nn.Module, device: torch.device) -> None:
        """Move experts and routers; the rest moves as shards."""
        for module in modules_kept_whole(model):
            module.to(device)

    def own_masters(self, model: nn.Module) -> Set[str]:
        """Return the parameters to shard: FSDP casts them when it gathers them."""
        whole = _parameters_kept_whole(model)
        return frozenset(name for name, p in model.named_parameters() if p not in whole)

    def wrap(
        self, objective: nn.Module, model: nn.Module, dtype: torch.dtype, device: torch.device
    ) -> nn.Module:
        """Shard ``objective`` in place and return it."""
        assert isinstance(model, Model)
        self._root = shard_dense(objective, model, self._mesh, dtype, device)
        self.gradients = ShardedMainGradients(model, self._mesh)
        return objective

    def accumulating(self) -> AbstractContextManager[object]:
        """Keep a micro-batch's gradients on this rank: whole, in fp32, until the next reduction."""
        return _without_reduction(self._root)

    def backward(self, loss: Tensor) -> None:
        """Run backward, which reduces the shards; then collect the other gradients."""
        loss.backward()
        self.gradients.accumulate()

    def step(self, optimizer: Optimizer, lr: float, clip: Clip) -> None:
        """Update this rank's shards, and identically on all ranks the parameters held whole."""
        self.gradients.scale_(clip(self.gradients.norm()))
        optimizer.step(lr)


def modules_kept_whole(model: nn.Module) -> list[nn.Module]:
    """Return the modules whose parameters FSDP leaves alone: experts and routers."""
    return [module for module in model.modules() if isinstance(module, Experts | Router)]


def shard_dense(
    objective: nn.Module, decoder: Model, mesh: Mesh, dtype: torch.dtype, device: torch.device
) -> FSDPModule:
    """Shard the dense parameters of ``decoder`` in place, layer by layer, and move the shards.

    ``objective`` is the module whose forward runs the whole decoder. Its parameters are wide and
    may still lie on the CPU; forward and backward see them in ``dtype``.
    """
    assert mesh.dp_group is not None, "one process has nothing to shard"
    options: dict[str, Any] = {
        "mesh": DeviceMesh.from_group(mesh.dp_group, device.type),
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=dtype,
            reduce_dtype=torch.promote_types(dtype, torch.float32),
            cast_forward_inputs=False,  # routing weights stay fp32
        ),
        "ignored_params": _parameters_kept_whole(decoder),
    }
    for module in [*decoder.layers, objective]:
        unit = fully_shard(module, **options)
        # Losses are shares of a sum, so gradients are summed; FSDP averages by default. Setting
        # only the factor would select a reduction that only NCCL has.
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
    for layer in decoder.layers:
        for name in getattr(layer, "entries", ()):
            register_fsdp_forward_method(layer, name)
    objective.register_forward_hook(_reshard_without_backward)
    assert isinstance(objective, FSDPModule)
    return objective


def _parameters_kept_whole(model: nn.Module) -> set[nn.Parameter]:
    return {p for module in modules_kept_whole(model) for p in module.parameters()}


def _reshard_without_backward(root: nn.Module, _inputs: Any, _output: Any) -> None:
    """Free the root's gathered parameters after an evaluation, which has no backward."""
    assert isinstance(root, FSDPModule)
    if not (torch.is_grad_enabled() and root.training):
        root.reshard()


@contextmanager
def _without_reduction(objective: FSDPModule) -> Iterator[None]:
    objective.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        objective.set_requires_gradient_sync(True)


class ShardedMainGradients(PartMainGradients):
    """Main gradients of this rank's shards. Create it after :func:`shard_dense`."""

    def __init__(self, model: nn.Module, mesh: Mesh) -> None:
        trained = [p for p in model.parameters() if p.requires_grad]
        sharded: list[nn.Parameter] = [p for p in trained if isinstance(p, DTensor)]
        super().__init__(model, mesh, sharded)
        for parameter in sharded:
            parameter.register_post_accumulate_grad_hook(_add_to_main_grad)
        self._sharded_flat = attach(sharded, trained[0], None)

    def zero(self) -> None:
        """Forget the last step."""
        super().zero()
        self._sharded_flat.zero_()

    def scale_(self, factor: Tensor) -> None:
        """Multiply all main gradients by ``factor``."""
        super().scale_(factor)
        self._sharded_flat.mul_(factor)


def _add_to_main_grad(parameter: Tensor) -> None:
    """Add the gradient that FSDP has just reduced, while backward continues."""
    assert isinstance(parameter.grad, DTensor)
    parameter.main_grad.add_(parameter.grad.to_local())  # type: ignore[attr-defined]
    parameter.grad = None
