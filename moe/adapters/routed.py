"""LoRA experts of a dense MLP in serving: its router chooses one of them for each row.

N rows, E LoRA experts, P rank, D model width, F inner width.
"""

from dataclasses import dataclass

from torch import Tensor

from ...kernels.routed_low_rank import RowGroups, group_rows, served_low_rank
from ...kernels.values.expert_update import ExpertUpdate
from ..routers.router import Router
from ..routers.routing import RouterInput


@dataclass(frozen=True, slots=True, eq=False)
class RoutedUpdate:
    """``W x + w B_e (A_e x)`` of gate, up and down of one MLP, with one choice e for all three."""

    router: Router
    """Chooses one expert for a row, from what the MLP reads. In evaluation mode."""
    update: ExpertUpdate
    """A and B of all experts; the factor s of LoRA is in B."""
    is_weighted: bool
    """Whether w is the router's probability of e; else w is 1."""

    def choose(self, x_ND: Tensor) -> "ChosenUpdate":
        """Return the update of rows ``x``, for their experts."""
        routing = self.router.route(RouterInput(x_ND))
        groups = group_rows(routing.experts_TK[:, 0], self.router.num_experts)
        weights_N1 = routing.weights_TK if self.is_weighted else None
        return ChosenUpdate(self.update, groups, weights_N1)


@dataclass(frozen=True, slots=True, eq=False)
class ChosenUpdate:
    """A :class:`RoutedUpdate` for rows whose experts are known."""

    update: ExpertUpdate
    groups: RowGroups
    weights_N1: Tensor | None

    def first(self, x_ND: Tensor) -> Tensor:
        """Return what gate and up get in addition, ``[N, 2F]``; a row's bits are its own."""
        assert self.update.fc1_EPD is not None, "LoRA experts update all three projections"
        return self._weighted(served_low_rank(x_ND, *self.update.fc1_EPD, self.groups))

    def second(self, act_NF: Tensor) -> Tensor:
        """Return what down gets in addition, ``[N, D]``."""
        assert self.update.fc2_EPF is not None, "LoRA experts update all three projections"
        return self._weighted(served_low_rank(act_NF, *self.update.fc2_EPF, self.groups))

    def _weighted(self, y_NQ: Tensor) -> Tensor:
        return y_NQ if self.weights_N1 is None else (y_NQ * self.weights_N1).to(y_NQ.dtype)
