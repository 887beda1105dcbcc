"""Main gradients: fp32 sums over micro-batches and ranks, equal to one process's gradients.

Losses are sums over local tokens divided by the tokens of the global batch, so gradients are
summed, never averaged. If all ranks are on one host, main gradients lie in shared memory and are
summed there after backward. Otherwise the dense engine reduces dense parameters while backward
still runs. Experts are always summed here, over the ranks that hold the same ones.
"""

from collections.abc import Collection, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...kernels.values.main_grads import MainGrads
from ...moe.experts.resident import Experts
from ..host.group import HostGroup, SharedSum
from ..mesh import Mesh
from ..watch.pulse import pulse
from .expert_shards import ExpertShards
from .local_part import local_part
from .tied import TiedEmbedding


def expert_parameter_names(model: nn.Module) -> set[str]:
    """Return the names of all parameters that belong to experts."""
    return {
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if isinstance(module, Experts)
        for name, _ in module.named_parameters()
    }


class MainGradients:
    """One flat buffer of main gradients with a view for every trainable parameter.

    Those of the parameters ``elsewhere`` are in other code's hands.
    """

    def __init__(
        self, model: nn.Module, mesh: Mesh, elsewhere: Collection[nn.Parameter] = ()
    ) -> None:
        self._mesh = mesh
        self._tied = TiedEmbedding.of(model, mesh)
        others = set(elsewhere)
        expert_names = expert_parameter_names(model)
        trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self.dense = [p for n, p in trainable if n not in expert_names and p not in others]
        self.experts = [p for n, p in trainable if n in expert_names]
        like = trainable[0][1]
        self._dense_sum = _shared_sum(self.dense, like, mesh.dp_host)
        self._expert_sum = _shared_sum(self.experts, like, mesh.edp_host)
        self.shards: ExpertShards | None = None
        """Who updates which expert. Set before the first step, if ranks share out their state."""
        self._dense_flat = attach(self.dense, like, self._dense_sum)
        self._expert_flat = attach(self.experts, like, self._expert_sum)
        self._trained = [m for m in model.modules() if isinstance(m, Experts) and m.matrices_train]
        self._main_grads: list[MainGrads] = []
        self._give_to_experts()
        written = {id(sums) for main in self._main_grads for sums in (main.fc1_SHD, main.fc2_SDF)}
        self._only_added = [
            p.main_grad  # type: ignore[attr-defined]
            for p in self.experts
            if id(p.main_grad) not in written  # type: ignore[attr-defined]
        ]
        """Main gradients of experts that no kernel overwrites in a new step: low-rank updates."""

    def _give_to_experts(self) -> None:
        """Let the kernels of trained experts write to their main gradients."""
        self._main_grads.clear()
        for module in self._trained:
            parameters = (module.fc1, module.fc2, module.fc1_bias, module.fc2_bias)
            module.main_grads = MainGrads.of([getattr(p, "main_grad", None) for p in parameters])
            self._main_grads.append(module.main_grads)

    def fit_experts(self) -> None:
        """Give experts their views again, after slots have moved between layers of this rank."""
        share_views(self.experts, self._expert_flat)
        self._give_to_experts()

    @property
    def sums_dense(self) -> bool:
        """Whether :meth:`reduce` also sums the dense gradients; then no other code needs to.

        With stages it always does: their backward passes take turns with forward passes, which DDP
        does not expect.
        """
        return self._dense_sum is not None or self._mesh.pp_size > 1

    def zero(self) -> None:
        """Forget the last step."""
        self._dense_flat.zero_()
        for main in self._main_grads:
            main.is_empty = True
        for sums in self._only_added:
            sums.zero_()

    def accumulate(self) -> None:
        """Add the gradients that autograd left on the parameters, then clear those."""
        for main in self._main_grads:
            main.begin_with_zeros()  # other backends do not write them
        for parameter in (*self.dense, *self.experts):
            if parameter.grad is not None:
                parameter.main_grad.add_(parameter.grad)  # type: ignore[attr-defined]
                parameter.grad = None

    @pulse.in_collective("the sum of gradients")
    def reduce(self) -> None:
        """Sum the gradients of experts over the ranks that hold the same ones.

        With ``shards`` only the owner of an expert has its sum, if links carry it. Dense gradients
        are summed here as well if :attr:`sums_dense`.
        """
        if self._dense_sum is not None:
            self._dense_sum.all_reduce()
        elif self.sums_dense and self._dense_flat.numel():
            assert self._mesh.dp_group is not None
            _all_reduce(self._dense_flat, self._mesh.dp_group)
        if self._expert_sum is not None:
            self._expert_sum.all_reduce()
        elif self.shards is not None:
            self.shards.sum_gradients(self.experts)
        elif self._mesh.edp_group is not None and self._expert_flat.numel():
            _all_reduce(self._expert_flat, self._mesh.edp_group)
        if self._tied is not None:
            self._tied.sum()

    @pulse.in_collective("the norm of gradients")
    def norm(self) -> Tensor:
        """Return the global 2-norm, each distinct parameter counted once, as an fp64 scalar."""
        counted = self.dense
        if self._tied is not None and not self._tied.counts:
            counted = [p for p in counted if p is not self._tied.parameter]
        dense = square_sum(counted, self._dense_flat)
        if self.shards is not None and self._expert_sum is None:
            owned = self.shards.owned_gradients(self.experts)
            experts, group = squares_of(owned, self._expert_flat), self._mesh.dp_group
        else:
            experts = square_sum(self.experts, self._expert_flat)
            group = self._mesh.experts_group
        if group is not None:
            _all_reduce(experts, group)
        total = dense + experts
        if self._mesh.pp_group is not None:
            _all_reduce(total, self._mesh.pp_group)
        return total.sqrt()

    def scale_(self, factor: Tensor) -> None:
        """Multiply all main gradients by ``factor``."""
        self._dense_flat.mul_(factor)
        self._expert_flat.mul_(factor)


def _all_reduce(tensor: Tensor, group: dist.ProcessGroup) -> None:
    """Sum over the ranks of a group, in place. NCCL opens nothing for a group of one rank."""
    if dist.get_world_size(group) > 1:
        dist.all_reduce(tensor, group=group)


def _shared_sum(
    parameters: list[nn.Parameter], like: Tensor, host: HostGroup | None
) -> SharedSum | None:
    """Return memory shared by the ranks of ``host`` for main gradients, or None if impossible."""
    numel = sum(local_part(p).numel() for p in parameters)
    if host is None or numel == 0:
        return None
    return SharedSum.create(host, numel, _wide(like))


def attach(parameters: list[nn.Parameter], like: Tensor, shared: SharedSum | None) -> Tensor:
    """Give every parameter its view of one flat buffer, and return that."""
    parts = [local_part(p) for p in parameters]
    if shared is None:
        numel = sum(p.numel() for p in parts)
        flat = torch.zeros(numel, dtype=_wide(like), device=like.device)
    else:
        flat = shared.local
    share_views(parameters, flat)
    return flat


def share_views(parameters: list[nn.Parameter], flat: Tensor) -> None:
    """Give every parameter its view of ``flat``, which has room for all of them."""
    parts = [local_part(parameter) for parameter in parameters]
    views = flat.split([part.numel() for part in parts])
    for parameter, part, view in zip(parameters, parts, views, strict=True):
        parameter.main_grad = view.view(part.shape)  # type: ignore[attr-defined]


def _wide(like: Tensor) -> torch.dtype:
    return torch.promote_types(like.dtype, torch.float32)


def square_sum(parameters: list[nn.Parameter], like: Tensor) -> Tensor:
    """Return the sum of squares of main gradients; see :func:`squares_of`."""
    return squares_of([p.main_grad for p in parameters], like)  # type: ignore[attr-defined]


def squares_of(tensors: Iterable[Tensor], like: Tensor) -> Tensor:
    """Return the sum of squares: within a tensor in its type, over tensors in fp64."""
    total = torch.zeros((), dtype=torch.float64, device=like.device)
    for tensor in tensors:
        total += torch.linalg.vector_norm(tensor).double().square()
    return total
