"""The MoE layer: a router, the path through the experts, an optional shared expert.

T tokens, D model width.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..kernels.experts import Backend
from ..kernels.values.activation import ACTIVATIONS, Activation, gated
from .experts.base import LayerExperts
from .experts.path import ExpertPath, LocalPath
from .experts.resident import Experts
from .linear import Linear
from .routers.losses import total_loss
from .routers.router import Router, RouterConfig, RouterSizes
from .routers.routing import Lookahead, Reduce, RouterInput, Routing
from .routers.topk import TopK


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
    """A sparse Mixture-of-Experts layer: each token is computed by the experts that a router picks.

    ``layer(x)`` takes ``[..., d_model]`` and returns ``(y, routing)``, y shaped like x. The
    routers' losses are not in y: add ``layer.auxiliary_loss(routing)`` to yours.

    Args:
        d_model: Width of a token.
        d_expert: Inner width of one expert, a gated MLP ``down(act(gate x) * up x)``.
        num_experts: Routed experts.
        router: A router's configuration: ``TopK(k=4)`` (None = ``TopK()``, 2 experts a token),
            ``Hash()``, or your own :class:`RouterConfig` that builds your :class:`Router`.
        activation: ``swiglu``, ``reglu``, ``geglu``, or gpt-oss's ``clamped_swiglu``.
        d_shared: Inner width of a shared expert that every token visits; 0 = none.
        shared_gate: Multiply the shared expert by ``sigmoid(w x)`` (Qwen2-MoE).
        vocab_size: Number of token ids, for routers that read them (``Hash``).
        token_counts: How often each id occurs, for ``Hash`` with a balanced table; None = equally.
        expert_ids: Experts that this process holds, for expert parallelism; None = all.
        backend: ``auto`` takes the fastest that passes its self-check; ``reference`` is slow and
            takes fp64; docs/backends.md has the others.
        recompute: Keep only the experts' input for backward, and not their pre-activations: less
            memory, a third of the forward again.
        expert_bias: Give each expert's two products a bias (gpt-oss).

    Raises :class:`ConfigError` for sizes and routers that do not fit, also from ``forward``.
    """

    def __init__(
        self,
        d_model: int,
        d_expert: int,
        num_experts: int,
        router: RouterConfig | None = None,
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
        sizes_given = {"d_model": d_model, "d_expert": d_expert, "num_experts": num_experts}
        for name, width in sizes_given.items():
            if type(width) is not int or width < 1:
                raise ConfigError(f"{name} is {width!r}; use a whole number from 1 upwards.")
        if activation not in ACTIVATIONS:
            raise ConfigError(f"activation is {activation!r}; use one of {', '.join(ACTIVATIONS)}.")
        self.d_model, self.d_expert, self.num_experts = d_model, d_expert, num_experts
        sizes = RouterSizes(d_model, num_experts, vocab_size, token_counts)
        self.gate: Router = _build(TopK() if router is None else router, sizes)
        self.experts: LayerExperts = Experts(
            d_model, d_expert, num_experts, expert_ids, backend, activation, recompute, expert_bias
        )
        self.shared_expert = GatedMLP(d_model, d_shared, activation) if d_shared else None
        self.shared_expert_gate = Linear(d_model, 1) if shared_gate else None
        self.path: ExpertPath = LocalPath()
        """How rows get to their experts and back."""

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

        ``token_ids`` (int64, only read by routers such as ``Hash``) and ``valid`` (bool, False for
        padding, which is neither computed nor counted) have x's leading shape; its last dimension
        is the tokens of a sequence. ``routing`` is a choice made earlier; layers whose router does
        not read x need it.
        """
        self._check(x, token_ids, valid)
        x_TD = x.reshape(-1, self.d_model)
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
        shared = None
        if self.shared_expert is not None:
            shared = partial(_run_shared, self.shared_expert, self.shared_expert_gate, x_TD)
        y_TD = self.path.run(x_TD, routing, self.experts, shared)
        return y_TD.view_as(x), routing

    def extra_repr(self) -> str:
        """Show the layer's widths and its parameters."""
        total = sum(parameter.numel() for parameter in self.parameters())
        return (
            f"d_model={self.d_model}, d_expert={self.d_expert}, num_experts={self.num_experts}, "
            f"parameters={total:,}"
        )

    def _check(self, x: Tensor, token_ids: Tensor | None, valid: Tensor | None) -> None:
        if not isinstance(x, Tensor):
            raise ConfigError(f"x is a {type(x).__name__}; give a tensor [..., {self.d_model}].")
        if x.ndim == 0 or x.shape[-1] != self.d_model:
            raise ConfigError(
                f"x has shape {list(x.shape)}, but d_model is {self.d_model}; give [..., "
                f"{self.d_model}]."
            )
        for name, given in (("token_ids", token_ids), ("valid", valid)):
            if given is not None and given.shape != x.shape[:-1]:
                raise ConfigError(
                    f"{name} has shape {list(given.shape)} and x {list(x.shape)}; give "
                    f"{list(x.shape[:-1])}, a value for each token."
                )

    def auxiliary_loss(self, routing: Routing, reduce: Reduce | None = None) -> Tensor:
        """Return :func:`auxiliary_loss` of this layer alone."""
        return auxiliary_loss([self], [routing], reduce)


def _build(config: RouterConfig, sizes: RouterSizes) -> Router:
    if not isinstance(config, RouterConfig):
        raise ConfigError(
            f"router is {config!r}; give the configuration of a router, such as moeyard.TopK(k=4)."
        )
    router = config.build(sizes)
    if not isinstance(router, Router):
        raise ConfigError(
            f"router is {type(config).__name__}, whose build returned a {type(router).__name__}; "
            "return a moeyard.Router."
        )
    return router


def _run_shared(expert: nn.Module, gate: nn.Module | None, x_TD: Tensor) -> Tensor:
    """Return what the shared expert adds to every token."""
    y_TD: Tensor = expert(x_TD)
    return y_TD if gate is None else gate(x_TD).sigmoid() * y_TD


def auxiliary_loss(
    layers: Sequence[MoELayer], routings: Sequence[Routing], reduce: Reduce | None = None
) -> Tensor:
    """Return what the routers' configurations ask to be added to the loss, a scalar with gradient.

    ``layers`` and ``routings`` are in the same order: each layer's ``y, routing = layer(x)``.

    For :class:`TopK` it is the sum of ``balance_loss``, ``sequence_balance_loss`` and ``z_loss``
    times their losses over ``layers``, whose forward returned ``routings``. The layer does
    not add them by itself. ``reduce`` sums an int64 tensor over the ranks that share the batch; the
    result is then this rank's share, and the shares add up to the loss of one process. None = one
    process.

    Raises :class:`ConfigError` for routings of evaluation mode, and for those that lost their
    gradient to ``torch.no_grad`` or a reentrant checkpoint.
    """
    return total_loss([layer.gate for layer in layers], routings, reduce)
