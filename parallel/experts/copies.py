"""Copies of other ranks' experts, for one layer and one step.

N rows, D model width, K choices, E experts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...kernels.values.main_grads import MainGrads
from ...moe.experts.base import LayerExperts
from ...moe.experts.resident import Experts
from ...moe.routers.routing import Routing

NAMES = ("fc1", "fc2", "fc1_bias", "fc2_bias")


class Copies:
    """Slots for copies of experts, with room for their gradients.

    ``own`` are the experts that this rank trains. Copies are like them but are not trained: their
    gradients go to the owners.
    """

    def __init__(self, own: Experts, num_slots: int) -> None:
        self.experts = own.like(num_slots)
        self._weights = [None if p is None else p.data for p in _parameters(self.experts)]
        wide = torch.promote_types(own.fc1.dtype, torch.float32)
        self._sums = [
            None if whole is None else torch.empty_like(whole, dtype=wide)
            for whole in self._weights
        ]
        self.experts.main_grads = MainGrads.of(self._sums)
        self._by_number: dict[int, list[nn.Parameter | None]] = {}
        """By number of slots: parameters with the first ones. A graph keeps the shape that a
        parameter had when it was made, so one parameter cannot take turns with several."""
        self.held: tuple[int, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Memory of all slots: weights and gradients."""
        whole = [t for t in (*self._weights, *self._sums) if t is not None]
        return sum(tensor.numel() * tensor.element_size() for tensor in whole)

    def hold(self, expert_ids: Sequence[int]) -> None:
        """Give the first slots to these experts, without weights yet, and forget the gradients.

        Kernels see these slots only. A graph that was made while a layer's experts were held finds
        its weights and sums again when the same experts are held again.
        """
        self.held = tuple(expert_ids)
        self.experts.hold(self.held)
        main = self.experts.main_grads
        assert main is not None
        number = len(self.held)
        if number not in self._by_number:
            first = [None if whole is None else whole[:number] for whole in self._weights]
            self._by_number[number] = [None if w is None else nn.Parameter(w) for w in first]
        for name, parameter in zip(NAMES, self._by_number[number], strict=True):
            setattr(self.experts, name, parameter)
        sums = [None if whole is None else whole[:number] for whole in self._sums]
        main.fc1_SHD, main.fc2_SDF, main.fc1_bias_SH, main.fc2_bias_SD = sums
        main.is_empty = True

    def collect_gradients(self) -> None:
        """Add the gradients that autograd left on the copies, as some backends do, to the sums."""
        main = self.experts.main_grads
        assert main is not None
        for parameter, total in zip(_parameters(self.experts), main.totals, strict=True):
            if parameter is not None and parameter.grad is not None:
                assert total is not None
                main.begin_with_zeros()
                total.add_(parameter.grad)
                parameter.grad = None

    def weights_of(self, expert: int) -> list[Tensor]:
        """Return the tensors of a held expert."""
        return weights_of(self.experts, self.held.index(expert))

    def gradients_of(self, expert: int) -> list[Tensor]:
        """Return the gradients of a held expert."""
        begin_with_zeros(self.experts)
        return sums_of(self.experts, self.held.index(expert))


def _parameters(experts: Experts) -> tuple[torch.nn.Parameter | None, ...]:
    return experts.fc1, experts.fc2, experts.fc1_bias, experts.fc2_bias


def weights_of(experts: Experts, slot: int) -> list[Tensor]:
    """Return the tensors of a slot."""
    return [p.data[slot] for p in _parameters(experts) if p is not None]


def begin_with_zeros(experts: Experts) -> None:
    """Fill sums that no backward has written."""
    assert experts.main_grads is not None, "gradients are kept elsewhere"
    experts.main_grads.begin_with_zeros()


def sums_of(experts: Experts, slot: int) -> list[Tensor]:
    """Return the main gradients of a slot; their values count once something was written."""
    assert experts.main_grads is not None, "gradients are kept elsewhere"
    return [total[slot] for total in experts.main_grads.totals if total is not None]


class WithCopies(LayerExperts):
    """A layer's own experts and the copies that this rank holds in this step, as one."""

    def __init__(self, own: Experts, copies: Copies) -> None:
        super().__init__()
        self._parts = (own, copies.experts)
        is_copy_E = torch.zeros(own.num_experts, dtype=torch.bool)
        is_copy_E[list(copies.held)] = True
        self._is_copy_E = is_copy_E.to(own.fc1.device)

    def announce(self, routing: Routing) -> None:
        """Do nothing: experts in memory are always ready."""

    def keep(self, routing: Routing) -> None:
        """Do nothing: experts in memory stay there."""

    def forward(
        self,
        x_ND: Tensor,
        experts_NK: Tensor,
        weights_NK: Tensor,
        most_choices: int | None = None,
    ) -> Tensor:
        """Return the weighted sum of each row's experts, ``[N, D]``: own ones, then copies."""
        own, copies = self._parts
        is_copy_NK = self._is_copy_E[experts_NK.clamp(min=0)] & (experts_NK >= 0)
        own_NK = torch.where(is_copy_NK, -1, experts_NK)
        copies_NK = torch.where(is_copy_NK, experts_NK, -1)
        y_ND: Tensor = own(x_ND, own_NK, weights_NK, most_choices)
        return y_ND + copies(x_ND, copies_NK, weights_NK, most_choices)
