"""Write routed experts with pruned groups, one matrix at a time."""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Protocol

from torch import Tensor

from ...kernels.values.group_sparse import GroupSparseView
from ..config.model import LayersConfig
from .expert_layouts import SeparateExperts
from .families.family import Family
from .group_sparse_format import GroupSparseFormat, names_of
from .shards import TensorPlan


class Pruner(Protocol):
    """Prunes matrices of experts."""

    def pruned(
        self, layer: int, expert: int, part: str, weight_QP: Tensor, kept: int
    ) -> GroupSparseView:
        """Return ``part`` of an expert, whose weights are given, with ``kept`` groups a row."""
        ...


def prune(
    plans: Iterable[TensorPlan],
    packed: GroupSparseFormat,
    config: LayersConfig,
    family: Family,
    pruner: Pruner,
) -> list[TensorPlan]:
    """Return the plans of a folder in which the experts' matrices are pruned."""
    moe, layout = config.moe, family.experts
    assert moe is not None and isinstance(layout, SeparateExperts), "checked by choose_sparsity"
    pruned_by = {
        layout.name(layer, expert, part): partial(pruner.pruned, layer, expert, part)
        for layer in config.moe_layers
        for expert in range(moe.num_experts)
        for part in (*moe.fc1_parts, "down")
    }
    found: list[TensorPlan] = []
    for plan in plans:
        if plan.name in pruned_by:
            found += _pruned(_PrunedMatrix(plan, packed, pruned_by[plan.name]), packed)
        else:
            found.append(plan)
    return found


class _PrunedMatrix:
    """Prunes a matrix when its first tensor is read, and frees each tensor after that."""

    def __init__(
        self, plan: TensorPlan, packed: GroupSparseFormat, pruned: "partial[GroupSparseView]"
    ) -> None:
        self.plan, self._packed, self._pruned_of = plan, packed, pruned
        self._left: dict[str, Tensor] = {}

    def take(self, name: str) -> list[Tensor]:
        if not self._left:
            (weight_QP,) = self.plan.parts()
            kept = self._packed.kept(self.plan.name, weight_QP.shape[1])
            view = self._pruned_of(weight_QP, kept)
            self._left = dict(zip(names_of(self.plan.name), view, strict=True))
        return [self._left.pop(name)]


def _pruned(matrix: _PrunedMatrix, packed: GroupSparseFormat) -> Iterator[TensorPlan]:
    plan = matrix.plan
    for name, (dtype, shape) in packed.stored(plan.name, *plan.shape).items():
        yield TensorPlan(name, dtype, shape, partial(matrix.take, name), plan.layer, plan.expert)
