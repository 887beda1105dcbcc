"""The MoE layer: a router, the path through the experts, an optional shared expert.

T tokens, D model width.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..kernels.experts import Backend
from ..kernels.values.activation import ACTIVATIONS, Activation
from .adapters.rows import AdapterRows
from .experts.adapted import of_lines
from .experts.average import AverageExpert
from .experts.base import LayerExperts
from .experts.core_rows import CoreRows, path_of
from .experts.path import Beside, ExpertPath, LocalPath
from .experts.resident import Experts
from .gated_mlp import GatedMLP, run_shared
from .linear import Linear
from .routers.averaged import AveragedConfig
from .routers.build import build_router
from .routers.loss_terms import GlobalCounts
from .routers.losses import add_counts, global_counts, total_loss
from .routers.router import Router, RouterConfig, RouterSizes
from .routers.routing import Lookahead, Reduce, RouterInput, Routing
from .routers.split_rows import split_rows
from .routers.topk import TopK


class MoELayer(nn.Module):
    """A sparse Mixture-of-Experts layer: each token is computed by the experts that a router picks.

    ``layer(x)`` takes ``[..., d_model]`` and returns ``(y, routing)``, y shaped like x. The
    routers' losses are not in y: add ``layer.auxiliary_loss(routing)`` to yours.

    Args:
        d_model: Width of a token.
        d_expert: Inner width of one expert, an MLP ``down(act(gate x) * up x)``.
        num_experts: Routed experts.
        router: A router's configuration: ``TopK(k=4)`` (None = ``TopK()``, 2 experts a token),
            ``Hash()``, or your own :class:`RouterConfig` that builds your :class:`Router`.
        activation: ``swiglu``, ``reglu``, ``geglu``, ``clamped_swiglu``, ``relu`` or ``gelu``.
        d_shared: Inner width of a shared expert that every token visits; 0 = none.
        shared_gate: Multiply the shared expert by ``sigmoid(w x)`` (Qwen2-MoE).
        vocab_size: Number of token ids, for routers that read them (``Hash``).
        layer: Number of the layer in your model; routers of different layers draw differently.
        token_counts: How often each id occurs, for ``Hash`` with a balanced table; None = equally.
        expert_ids: Experts that this process holds, for expert parallelism; None = all.
        backend: ``auto`` takes the fastest that passes its self-check; ``reference`` is slow and
            takes fp64; docs/backends.md has the others.
        recompute: Keep only the experts' input for backward, and not their pre-activations: less
            memory, a third of the forward again.
        expert_bias: Give each expert's two products a bias (gpt-oss).
        token_embeddings: Another model's token embeddings ``[V, width]``, for ``Hash`` with a
            clustered or dispersed table.

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
        layer: int = 0,
        expert_ids: Sequence[int] | None = None,
        backend: Backend = "auto",
        recompute: bool = False,
        expert_bias: bool = False,
        token_embeddings: Tensor | None = None,
    ) -> None:
        super().__init__()
        sizes_given = {"d_model": d_model, "d_expert": d_expert, "num_experts": num_experts}
        for name, width in sizes_given.items():
            if type(width) is not int or width < 1:
                raise ConfigError(f"{name} is {width!r}; use a whole number from 1 upwards.")
        if activation not in ACTIVATIONS:
            raise ConfigError(f"activation is {activation!r}; use one of {', '.join(ACTIVATIONS)}.")
        self.d_model, self.d_expert, self.num_experts = d_model, d_expert, num_experts
        facts = (vocab_size, token_counts, layer, token_embeddings, expert_bias)
        sizes = RouterSizes(d_model, num_experts, *facts)
        self.gate: Router = build_router(TopK() if router is None else router, sizes, activation)
        self.gate.watch(self.gate_statistics)
        self.experts: LayerExperts = Experts(
            d_model, d_expert, num_experts, expert_ids, backend, activation, recompute, expert_bias
        )
        self.average: AverageExpert | None = None
        """The experts' mean, which takes their place outside training; None with most routers."""
        if isinstance(self.gate.config, AveragedConfig):
            self.average = AverageExpert(d_model, d_expert, activation, expert_bias, backend)
        self.shared_expert = GatedMLP(d_model, d_shared, activation) if d_shared else None
        self.shared_expert_gate = Linear(d_model, 1) if shared_gate else None
        self.path: ExpertPath = LocalPath()
        """How rows get to their experts and back."""

    @property
    def lookahead(self) -> Lookahead:
        """Where the router must be called."""
        return self.gate.lookahead

    def gate_statistics(self) -> Tensor | None:
        """Return mean and variance of all experts' gate rows, ``[E, 2, D]``, with gradient.

        Without a gate: of up rows. With biases ``[E, 2, D + 1]``. None if the experts are not
        parameters in memory, or the path does not reach all of them. Every rank must call it.
        """
        here = self.experts.gate_statistics()
        if here is None:
            return None
        found = self.path.gather(here)
        return found if len(found) == self.num_experts else None

    def forward(
        self,
        x: Tensor,
        *,
        token_ids: Tensor | None = None,
        valid: Tensor | None = None,
        tasks: Tensor | None = None,
        timesteps: Tensor | None = None,
        routing: Routing | None = None,
        adapters: AdapterRows | None = None,
        core: CoreRows | None = None,
    ) -> tuple[Tensor, Routing]:
        """Return the layer's output, shaped like ``x`` ``[..., D]``, and the routing.

        ``token_ids`` (int64, only read by routers such as ``Hash``) and ``valid`` (bool, False for
        padding, which is neither computed nor counted) have x's leading shape; its last dimension
        is the tokens of a sequence. So have ``tasks`` and ``timesteps``. ``routing`` is a choice
        made earlier, for routers that do not read x. ``adapters`` and ``core`` are for serving.
        """
        given = {"token_ids": token_ids, "valid": valid, "tasks": tasks, "timesteps": timesteps}
        self._check(x, given)
        rows = {name: None if v is None else v.reshape(-1) for name, v in given.items()}
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
                    ids_T=rows["token_ids"],
                    valid_T=rows["valid"],
                    tasks_T=rows["tasks"],
                    timesteps_T=rows["timesteps"],
                    lengths=(x.shape[-2],) * math.prod(x.shape[:-2]) if x.ndim > 2 else None,
                )
            )
        shared = None
        if self.shared_expert is not None:
            modules = (self.shared_expert, self.shared_expert_gate)
            shared = partial(run_shared, *modules, adapters, x_TD)
        path = path_of(self.path, self.experts, adapters, core)
        if self.average is not None and not self.training:
            y_TD = self.average(x_TD) if shared is None else self.average(x_TD) + shared()
        elif self.gate.config.varies:
            y_TD = self._run_lines(x_TD, routing, path, shared)
        else:
            y_TD = path.run(x_TD, routing, self.experts, shared)
        return y_TD.view_as(x), routing

    def _run_lines(
        self, x_TD: Tensor, routing: Routing, path: ExpertPath, beside: Beside | None
    ) -> Tensor:
        """Run the experts on lines of k choices; see split_rows.py."""
        tokens_N, experts_NW, weights_NW = split_rows(
            routing.experts_TK, routing.weights_TK, self.gate.k
        )
        lines = Routing(experts_NW, weights_NW, routing.counts_E, routing.num_tokens)
        y_ND = of_lines(path, tokens_N).run(x_TD[tokens_N], lines, self.experts)
        y_TD = torch.zeros_like(x_TD).index_add(0, tokens_N, y_ND)
        return y_TD if beside is None else y_TD + beside()

    def extra_repr(self) -> str:
        """Show the layer's widths and its parameters."""
        total = sum(parameter.numel() for parameter in self.parameters())
        return (
            f"d_model={self.d_model}, d_expert={self.d_expert}, num_experts={self.num_experts}, "
            f"parameters={total:,}"
        )

    def _check(self, x: Tensor, given: Mapping[str, Tensor | None]) -> None:
        if not isinstance(x, Tensor):
            raise ConfigError(f"x is a {type(x).__name__}; give a tensor [..., {self.d_model}].")
        if x.ndim == 0 or x.shape[-1] != self.d_model:
            raise ConfigError(
                f"x has shape {list(x.shape)}, but d_model is {self.d_model}; give [..., "
                f"{self.d_model}]."
            )
        for name, value in given.items():
            if value is not None and value.shape != x.shape[:-1]:
                raise ConfigError(
                    f"{name} has shape {list(value.shape)} and x {list(x.shape)}; give "
                    f"{list(x.shape[:-1])}, a value for each token."
                )

    def auxiliary_loss(self, routing: Routing, reduce: Reduce | None = None) -> Tensor:
        """Return :func:`auxiliary_loss` of this layer alone."""
        return auxiliary_loss([self], [routing], reduce)


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


def after_step(
    layers: Sequence[MoELayer],
    micro_batches: Sequence[Sequence[Routing]],
    reduce: Reduce | None = None,
) -> None:
    """Tell the routers that a step of training is done: biases move, schedules go on.

    ``micro_batches`` has the routings of each micro-batch of the step, in the order of ``layers``.
    ``reduce`` is that of :func:`auxiliary_loss`. Call it on every rank, after the optimizer's step.
    """
    counts: list[GlobalCounts] = []
    for routings in micro_batches:
        counts = add_counts(counts, global_counts(routings, reduce or (lambda counts: counts)))
    for layer, own in zip(layers, counts, strict=True):
        layer.gate.after_step(own, counts)
