"""Frozen experts that training reads from a model folder when it needs them.

N rows, D model width, F expert width, E experts, K choices.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from ...kernels.frozen_experts import frozen_expert_mlp
from ...kernels.values.activation import Activation
from ...kernels.values.frozen import FrozenExperts, Waves
from .base import LayerExperts
from .resident import Experts


class ExpertSource(Protocol):
    """Where the frozen experts of all layers are: serving's expert store."""

    num_slots: int
    """Experts that memory has room for."""

    def stream(self, layer: int, rows_of: Mapping[int, int]) -> Waves:
        """Yield the experts of ``layer`` that a forward or a backward needs, in waves.

        ``rows_of`` maps them to the number of rows that chose them. The weights of a wave stay
        valid until the next.
        """
        ...

    def close(self) -> None:
        """Stop reading."""
        ...


OpenSource = Callable[[str, torch.dtype, str], ExpertSource]
"""Opens the experts of a model folder in a type, with a budget such as ``8GiB`` or ``25%``."""


class StreamedExperts(Experts):
    """Replaces :class:`Experts` where their matrices are frozen and do not fit into memory.

    Only low-rank updates are parameters, those of all experts. Forward and backward each take the
    matrices from a source, some experts at a time, so the results are those of
    :class:`Experts` with the same matrices, bit for bit.
    """

    def __init__(
        self,
        source: ExpertSource,
        layer: int,
        num_experts: int,
        d_model: int,
        d_expert: int,
        activation: Activation,
        recompute: bool = False,
    ) -> None:
        LayerExperts.__init__(self)
        self.recompute = recompute
        self.activation = activation
        self.num_experts = num_experts
        self.expert_ids = tuple(range(num_experts))
        self.main_grads = None
        self.inner_slice = None
        self._low_rank_scale = None
        self._source, self._layer = source, layer
        self._d_model, self._d_expert = d_model, d_expert
        self._frozen = FrozenExperts(self._stream, num_experts, d_expert, activation)

    def _stream(self, rows_of: Mapping[int, int]) -> Waves:
        return self._source.stream(self._layer, rows_of)

    @property
    def matrices_train(self) -> bool:
        """False: the matrices are no parameters."""
        return False

    def add_low_rank(self, rank: int, scale: float) -> None:
        """Add low-rank updates; see :meth:`Experts.add_low_rank`."""
        shape = (self.num_experts, self._d_model, self._d_expert)
        self._register_low_rank(*shape, rank, scale, like=torch.empty(0))

    def gate_statistics(self) -> Tensor | None:
        """Return None: the matrices are not all here."""
        return None

    def extra_repr(self) -> str:
        """Say how many experts there are and how many fit into memory, for ``repr``."""
        return (
            f"{self.num_experts} frozen experts, d_model={self._d_model}, "
            f"d_expert={self._d_expert}, on disk; memory has {self._source.num_slots} slots for "
            "the experts of all layers"
        )

    def forward(
        self,
        x_ND: Tensor,
        experts_NK: Tensor,
        weights_NK: Tensor,
        most_choices: int | None = None,
    ) -> Tensor:
        """Return the weighted sum of each row's experts, ``[N, D]``."""
        return frozen_expert_mlp(
            *(x_ND, experts_NK, weights_NK, self._frozen, self._low_rank(x_ND.dtype)),
            recompute=self.recompute,
        )
