"""The MoE layer: router, dispatch, experts, combine, optional shared experts.

T tokens, D model width, F expert width, E experts, K choices, S expert slots here, N rows here.
"""

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import ConfigError
from ..kernels.activation import ACTIVATIONS, Activation, gated
from ..kernels.expert_mlp import Backend, expert_mlp
from ..kernels.expert_weights import ExpertWeights, MainGrads
from ..kernels.frozen_experts import LowRank, frozen_expert_mlp
from .build_router import build_router
from .linear import Linear
from .router import Router
from .router_config import Hash, TopK
from .routing import Lookahead, RouterInput, Routing

LOW_RANK = ("fc1_lora_a", "fc1_lora_b", "fc2_lora_a", "fc2_lora_b")
"""Parameters of low-rank updates, where experts have them."""


class Dispatcher(Protocol):
    """Brings rows to the ranks that hold their experts, and the results back."""

    def dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, Tensor, Tensor, Any]:
        """Return x_ND, experts_NK (-1 = not here), weights_NK and a handle for combine."""
        ...

    def combine(self, y_ND: Tensor, handle: Any) -> Tensor:
        """Return ``y_TD``, the sum of every rank's part of each token."""
        ...


class LocalDispatcher:
    """All experts are here: nothing moves."""

    def dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, Tensor, Tensor, None]:
        """Hand rows and routing through."""
        return x_TD, routing.experts_TK, routing.weights_TK, None

    def combine(self, y_ND: Tensor, handle: None) -> Tensor:
        """Hand the result through."""
        return y_ND


class AnyExperts(nn.Module):
    """What a layer asks of its experts, wherever they are."""

    def announce(self, routing: Routing) -> None:
        """Learn what the next forward will need, before other work that leads there."""
        raise NotImplementedError

    def keep(self, routing: Routing) -> None:
        """Hold on to what the next forward needs, which follows at once."""
        raise NotImplementedError

    def forward(self, x_ND: Tensor, experts_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """Return the weighted sum of each row's experts, ``[N, D]``."""
        raise NotImplementedError


class Experts(AnyExperts):
    """Gated experts as parameters: ``fc1 [S, 2F, D]`` (gate rows first), ``fc2 [S, D, F]``.

    With ``bias`` also ``fc1_bias [S, 2F]`` and ``fc2_bias [S, D]``, zeros at first; else None.
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
        """Whether backward computes fc1 again in place of keeping its output."""
        self.activation: Activation = activation
        self.expert_ids = tuple(range(num_experts) if expert_ids is None else expert_ids)
        """Logical expert of each slot."""
        self.backend: Backend = backend
        num_slots = len(self.expert_ids)
        self.fc1 = nn.Parameter(torch.empty(num_slots, 2 * d_expert, d_model))
        self.fc2 = nn.Parameter(torch.empty(num_slots, d_model, d_expert))
        nn.init.normal_(self.fc1, std=d_model**-0.5)
        nn.init.normal_(self.fc2, std=d_expert**-0.5)
        self.fc1_bias: nn.Parameter | None = None
        self.fc2_bias: nn.Parameter | None = None
        if bias:
            self.fc1_bias = nn.Parameter(torch.zeros(num_slots, 2 * d_expert))
            self.fc2_bias = nn.Parameter(torch.zeros(num_slots, d_model))
        self.main_grads: MainGrads | None = None
        """Where backward leaves the gradients of the parameters; None: where autograd does."""
        self._low_rank_scale: float | None = None
        self._slot_of_E: tuple[int, ...] | None = None
        if self.expert_ids != tuple(range(num_experts)):
            slots = [-1] * num_experts
            for slot, expert in enumerate(self.expert_ids):
                slots[expert] = slot
            self._slot_of_E = tuple(slots)

    def slot_views(self) -> list[dict[str, Tensor]]:
        """Return the writable parts of every slot; see :meth:`ExpertWeights.slot_views`."""
        biases = (None if bias is None else bias.data for bias in (self.fc1_bias, self.fc2_bias))
        weights = ExpertWeights(self.fc1.data, self.fc2.data, None, self.activation, None, *biases)
        return [weights.slot_views(slot) for slot in range(len(self.expert_ids))]

    def add_low_rank(self, rank: int, scale: float) -> None:
        """Add low-rank updates to frozen experts: B is 0, and A for the caller to fill.

        ``fc1_lora_a [S, 2 rank, D]``, ``fc1_lora_b [S, 2F, rank]`` (the gate's rows first),
        ``fc2_lora_a [S, rank, F]``, ``fc2_lora_b [S, D, rank]``.
        """
        num_slots, d_model, d_expert = self.fc2.shape
        shapes = ((2 * rank, d_model), (2 * d_expert, rank), (rank, d_expert), (d_model, rank))
        for name, shape in zip(LOW_RANK, shapes, strict=True):
            zeros = self.fc2.new_zeros(num_slots, *shape)
            self.register_parameter(name, nn.Parameter(zeros))
        self._low_rank_scale = scale

    def announce(self, routing: Routing) -> None:
        """Do nothing: experts in memory are always ready."""

    def keep(self, routing: Routing) -> None:
        """Do nothing: experts in memory stay there."""

    def forward(self, x_ND: Tensor, experts_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """Return the weighted sum of each row's experts, ``[N, D]``."""
        weights = self._weights()
        is_frozen = torch.is_grad_enabled() and not self.fc1.requires_grad
        if is_frozen or self._low_rank_scale is not None:
            return self._run_frozen(x_ND, experts_NK, weights_NK, weights)
        return expert_mlp(
            x_ND, experts_NK, weights_NK, weights, self.backend, recompute=self.recompute
        )

    def _weights(self) -> ExpertWeights:
        biases = (self.fc1_bias, self.fc2_bias)
        how = (self._slot_of_E, self.activation, self.main_grads)
        return ExpertWeights(self.fc1, self.fc2, *how, *biases)

    def _run_frozen(
        self, x_ND: Tensor, experts_NK: Tensor, weights_NK: Tensor, weights: ExpertWeights
    ) -> Tensor:
        low_rank = None
        if self._low_rank_scale is not None:
            a1, b1, a2, b2 = (getattr(self, name) for name in LOW_RANK)
            low_rank = LowRank(a1, b1, a2, b2, self._low_rank_scale)

        def run() -> Tensor:
            return frozen_expert_mlp(x_ND, experts_NK, weights_NK, weights, low_rank)

        if self.recompute and torch.is_grad_enabled():
            again: Tensor = checkpoint(run, use_reentrant=False)
            return again
        return run()


class GatedMLP(nn.Module):
    """A dense gated MLP: the decoder's dense layers and the shared experts."""

    def __init__(self, d_model: int, d_ff: int, activation: Activation = "swiglu") -> None:
        super().__init__()
        self.activation: Activation = activation
        self.gate_proj = Linear(d_model, d_ff)
        self.up_proj = Linear(d_model, d_ff)
        self.down_proj = Linear(d_ff, d_model)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Return ``down(act(gate x) * up x)``."""
        h = torch.cat([self.gate_proj(x_TD), self.up_proj(x_TD)], dim=-1)
        out: Tensor = self.down_proj(gated(h, self.activation))
        return out


class MoELayer(nn.Module):
    """A sparse Mixture-of-Experts layer.

    ``router`` is a router's configuration (``TopK(k=4)``, ``Hash()``). ``d_shared`` adds a shared
    expert of that width which every token visits. ``recompute`` keeps the experts' input only, and
    not their pre-activations, for backward. ``expert_bias`` gives each expert's two products a
    bias, as gpt-oss's have.
    """

    def __init__(
        self,
        d_model: int,
        d_expert: int,
        num_experts: int,
        router: TopK | Hash | None = None,
        activation: Activation = "swiglu",
        d_shared: int = 0,
        *,
        shared_gate: bool = False,
        vocab_size: int | None = None,
        token_counts: Sequence[int] | None = None,
        expert_ids: Sequence[int] | None = None,
        backend: Backend = "auto",
        recompute: bool = False,
        expert_bias: bool = False,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ConfigError(f"activation is {activation!r}; use one of {', '.join(ACTIVATIONS)}.")
        self.gate: Router = build_router(
            TopK() if router is None else router, d_model, num_experts, vocab_size, token_counts
        )
        self.experts: AnyExperts = Experts(
            d_model, d_expert, num_experts, expert_ids, backend, activation, recompute, expert_bias
        )
        self.shared_expert = GatedMLP(d_model, d_shared, activation) if d_shared else None
        self.shared_expert_gate = Linear(d_model, 1) if shared_gate else None
        self.dispatcher: Dispatcher = LocalDispatcher()

    @property
    def lookahead(self) -> Lookahead:
        """Where the router must be called."""
        return self.gate.lookahead

    def forward(
        self,
        x: Tensor,
        *,
        token_ids: Tensor | None = None,
        valid: Tensor | None = None,
        routing: Routing | None = None,
    ) -> tuple[Tensor, Routing]:
        """Return the layer's output, shaped like ``x`` ``[..., D]``, and the routing.

        ``token_ids`` and ``valid`` have x's leading shape; the last of it counts the tokens of a
        sequence. ``routing`` is a choice made earlier;
        routers that read something else than x need it.
        """
        x_TD = x.reshape(-1, x.shape[-1])
        if routing is None:
            if self.lookahead not in (Lookahead.FFN_INPUT, Lookahead.TOKEN):
                raise ConfigError(
                    f"router.lookahead is {self.lookahead.value}, so the choice is made before; "
                    "pass routing=layer.gate.route(...) of what the router reads."
                )
            routing = self.gate.route(
                RouterInput(
                    x_TD=x_TD,
                    ids_T=None if token_ids is None else token_ids.reshape(-1),
                    valid_T=None if valid is None else valid.reshape(-1),
                    lengths=(x.shape[-2],) * math.prod(x.shape[:-2]) if x.ndim > 2 else None,
                )
            )
        x_ND, experts_NK, weights_NK, handle = self.dispatcher.dispatch(x_TD, routing)
        y_ND = self.experts(x_ND, experts_NK, weights_NK)
        y_TD = self.dispatcher.combine(y_ND, handle)
        if self.shared_expert is not None:
            shared_TD = self.shared_expert(x_TD)
            if self.shared_expert_gate is not None:
                shared_TD = self.shared_expert_gate(x_TD).sigmoid() * shared_TD
            y_TD = y_TD + shared_TD
        return y_TD.view_as(x), routing
