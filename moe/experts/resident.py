"""The routed experts of a layer, in memory as parameters.

N rows, D model width, F expert width, E experts, K choices, S expert slots here.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...kernels.experts import Backend, expert_mlp
from ...kernels.frozen_experts import frozen_expert_mlp
from ...kernels.values.activation import Activation, fc1_parts, fc1_rows
from ...kernels.values.expert_weights import ExpertWeights
from ...kernels.values.frozen import FrozenExperts
from ...kernels.values.low_rank import LowRank
from ...kernels.values.main_grads import MainGrads
from ..adapters.rows import RowUpdates
from ..without_memory import without_memory
from .adapted import run_in_memory
from .base import LayerExperts
from .gate_statistics import gate_statistics
from .inner_slice import InnerSlice

LOW_RANK = ("fc1_lora_a", "fc1_lora_b", "fc2_lora_a", "fc2_lora_b")
"""Parameters of low-rank updates, if any."""


class Experts(LayerExperts):
    """Experts as parameters: ``fc1 [S, H, D]``, ``fc2 [S, D, F]``.

    H is 2F (gate rows first), or F for activations without a gate.
    With ``bias`` also ``fc1_bias [S, H]`` and ``fc2_bias [S, D]``, initially zeros; else None.
    """

    def __init__(
        self,
        d_model: int,
        d_expert: int,
        num_experts: int,
        expert_ids: Sequence[int] | None = None,
        backend: Backend = "auto",
        activation: Activation = "swiglu",
        recompute: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.recompute = recompute
        """Whether backward computes fc1 again instead of keeping its output."""
        self.activation: Activation = activation
        self.expert_ids = tuple(range(num_experts) if expert_ids is None else expert_ids)
        """Logical expert of each slot."""
        self.backend: Backend = backend
        self.num_experts = num_experts
        num_slots = len(self.expert_ids)
        d_hidden = fc1_rows(d_expert, activation)
        self.fc1 = nn.Parameter(torch.empty(num_slots, d_hidden, d_model))
        self.fc2 = nn.Parameter(torch.empty(num_slots, d_model, d_expert))
        nn.init.normal_(self.fc1, std=d_model**-0.5)
        nn.init.normal_(self.fc2, std=d_expert**-0.5)
        self.fc1_bias: nn.Parameter | None = None
        self.fc2_bias: nn.Parameter | None = None
        if bias:
            self.fc1_bias = nn.Parameter(torch.zeros(num_slots, d_hidden))
            self.fc2_bias = nn.Parameter(torch.zeros(num_slots, d_model))
        self.main_grads: MainGrads | None = None
        """Where backward leaves the parameters' gradients; None = in ``grad``, by autograd."""
        self.inner_slice: InnerSlice | None = None
        """Which slice of the experts' inner width is here; None = all of it."""
        self._low_rank_scale: float | None = None
        self._slot_of_E: tuple[int, ...] | None = None
        self.hold(self.expert_ids)

    def hold(self, expert_ids: Sequence[int]) -> None:
        """Say which experts the slots hold, in order; slots without an expert are not used."""
        self.expert_ids = tuple(expert_ids)
        self._slot_of_E = None
        if self.expert_ids != tuple(range(self.num_experts)):
            slots = [-1] * self.num_experts
            for slot, expert in enumerate(self.expert_ids):
                slots[expert] = slot
            self._slot_of_E = tuple(slots)

    def keep_slice(self, inner_slice: InnerSlice) -> None:
        """Keep a slice of the inner width of all experts; before anything refers to the weights."""
        self.inner_slice = inner_slice
        for name, parameter in self.named_parameters():
            parameter.data = inner_slice.cut(name, parameter.data)
            if not inner_slice.holds(name):
                parameter.requires_grad_(False)

    def like(self, num_slots: int, device: torch.device | None = None) -> "Experts":
        """Return experts of the same kind and type with ``num_slots`` slots, unfilled.

        ``device`` None = that of these experts.
        """
        _, d_model, d_expert = self.fc2.shape
        with without_memory():
            found = Experts(
                d_model,
                d_expert,
                self.num_experts,
                range(num_slots),
                self.backend,
                self.activation,
                self.recompute,
                self.fc1_bias is not None,
            )
        return found.to(self.fc1.dtype).to_empty(device=device or self.fc1.device)

    def slot_views(self) -> list[dict[str, Tensor]]:
        """Return the writable parts of every slot; see :meth:`ExpertWeights.slot_views`."""
        biases = (None if bias is None else bias.data for bias in (self.fc1_bias, self.fc2_bias))
        weights = ExpertWeights.of(
            (self.fc1.data, self.fc2.data, *biases), activation=self.activation
        )
        return [weights.slot_views(slot) for slot in range(len(self.expert_ids))]

    def add_low_rank(self, rank: int, scale: float) -> None:
        """Add low-rank updates to frozen experts: B is 0, and the caller must fill A.

        ``fc1_lora_a [S, 2 rank, D]``, ``fc1_lora_b [S, 2F, rank]`` (the gate's rows first),
        ``fc2_lora_a [S, rank, F]``, ``fc2_lora_b [S, D, rank]``. Without a gate those of fc1 are
        up's alone: ``[S, rank, D]`` and ``[S, F, rank]``.
        """
        num_slots, d_model, d_expert = self.fc2.shape
        self._register_low_rank(num_slots, d_model, d_expert, rank, scale, like=self.fc2)

    def _register_low_rank(
        self, num_slots: int, d_model: int, d_expert: int, rank: int, scale: float, like: Tensor
    ) -> None:
        parts = len(fc1_parts(self.activation))
        first = ((parts * rank, d_model), (parts * d_expert, rank))
        shapes = (*first, (rank, d_expert), (d_model, rank))
        for name, shape in zip(LOW_RANK, shapes, strict=True):
            zeros = like.new_zeros(num_slots, *shape)
            self.register_parameter(name, nn.Parameter(zeros))
        self._low_rank_scale = scale

    def _low_rank(self, dtype: torch.dtype) -> LowRank | None:
        if self._low_rank_scale is None:
            return None
        a1, b1, a2, b2 = (getattr(self, name).to(dtype) for name in LOW_RANK)
        return LowRank(a1, b1, a2, b2, self._low_rank_scale)

    @property
    def matrices_train(self) -> bool:
        """Whether fc1 and fc2 train; low-rank updates do not matter."""
        return self.fc1.requires_grad

    def gate_statistics(self) -> Tensor | None:
        """Return mean and variance of each slot's gate rows, ``[S, 2, D]``, with gradient.

        Without a gate those of its up rows: the rows that go through the activation. With biases
        ``[S, 2, D + 1]``. Low-rank updates are not in them. None for slices.
        """
        if self.inner_slice is not None:
            return None
        width = self.fc2.shape[2]
        return gate_statistics(self.fc1, self.fc1_bias, self.main_grads, width)

    def extra_repr(self) -> str:
        """Say how many experts there are and of which size, for ``repr``."""
        num_slots, d_model, d_expert = self.fc2.shape
        rank = ""
        if self._low_rank_scale is not None:
            rank = f", lora rank {self.get_parameter('fc2_lora_a').shape[1]}"
        bias = "" if self.fc1_bias is None else ", bias"
        if self.inner_slice is not None:
            d_expert *= self.inner_slice.count
            bias += f", slice {self.inner_slice.index + 1} of {self.inner_slice.count}"
        return (
            f"{num_slots} experts, d_model={d_model}, d_expert={d_expert}, {self.activation}{bias}"
            f"{rank}, {self.fc1.dtype} on {self.fc1.device}"
        )

    def adapted(
        self, x_ND: Tensor, experts_NK: Tensor, weights_NK: Tensor, updates: RowUpdates
    ) -> Tensor:
        """See :class:`LayerExperts`."""
        weights = self._weights(self.fc1.dtype)
        return run_in_memory(self, weights, (x_ND, experts_NK, weights_NK), updates)

    def forward(
        self,
        x_ND: Tensor,
        experts_NK: Tensor,
        weights_NK: Tensor,
        most_choices: int | None = None,
    ) -> Tensor:
        """Return the weighted sum of each row's experts, ``[N, D]``."""
        device = x_ND.device.type
        if not torch.is_autocast_enabled(device):
            return self._run(x_ND, experts_NK, weights_NK, self.fc1.dtype, most_choices)
        # Like nn.Linear, cast rows and weights to autocast's type. The kernels ignore autocast.
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            return self._run(x_ND.to(dtype), experts_NK, weights_NK, dtype, most_choices)

    def _run(
        self,
        x_ND: Tensor,
        experts_NK: Tensor,
        weights_NK: Tensor,
        dtype: torch.dtype,
        most_choices: int | None,
    ) -> Tensor:
        weights = self._weights(dtype)
        low_rank = self._low_rank(dtype)
        if low_rank is None:
            return expert_mlp(
                *(x_ND, experts_NK, weights_NK, weights, self.backend),
                recompute=self.recompute,
                most_choices=most_choices,
            )
        return frozen_expert_mlp(
            *(x_ND, experts_NK, weights_NK, FrozenExperts.in_memory(weights), low_rank),
            recompute=self.recompute,
        )

    def _weights(self, dtype: torch.dtype) -> ExpertWeights:
        fc1, fc2 = self.fc1.to(dtype), self.fc2.to(dtype)
        biases = (None if b is None else b.to(dtype) for b in (self.fc1_bias, self.fc2_bias))
        return ExpertWeights.of(
            (fc1, fc2, *biases),
            slot_of_E=self._slot_of_E,
            activation=self.activation,
            main_grads=self.main_grads,
        )
