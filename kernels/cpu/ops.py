"""The C++ expert MLP as ``torch.library`` operators with fake versions and a gradient.

torch.compile needs operators. Without it the kernels are called directly, which costs less.

T tokens, K choices, R = T*K routed rows, S slots, E experts, D model width, F expert width, H rows
of fc1.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..values.activation import ACTIVATIONS, Activation
from ..values.channel_weights import ChannelExpertWeights
from ..values.expert_weights import ExpertWeights, Parameters
from ..values.group_sparse import GroupSparseExpertWeights
from ..values.main_grads import MainGrads
from ..values.quantized_weights import QuantizedExpertWeights, QuantizedMatrices, SlotWeights
from ..values.two_of_four import TwoOfFourExpertWeights
from .experts import CppWaves, as_int32, is_plain
from .library import TYPES
from .training import forward_kept, gradients, have_backward


def can_compile(x_TD: Tensor, weights_TK: Tensor, experts: SlotWeights) -> bool:
    """Say whether the operators support these tensors in a compiled graph."""
    if not x_TD.is_cpu or x_TD.dtype not in TYPES or weights_TK.dtype not in TYPES:
        return False
    if isinstance(
        experts, ChannelExpertWeights | GroupSparseExpertWeights | TwoOfFourExpertWeights
    ):
        return False  # they have no operator
    if isinstance(experts, ExpertWeights) and torch.is_grad_enabled():
        fits = have_backward(experts)
    else:
        fits = is_plain(experts)
    return fits


def expert_mlp_compiled(
    x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, experts: SlotWeights
) -> Tensor:
    """Return ``y_t = sum_k weights[t, k] * MLP_{experts[t, k]}(x_t)``, ``[T, D]``."""
    assert not isinstance(experts, ChannelExpertWeights), "can_compile was not asked"
    slots = None if experts.slot_of_E is None else list(experts.slot_of_E)
    rows = (x_TD.contiguous(), as_int32(experts_TK), weights_TK.float().contiguous())
    if isinstance(experts, QuantizedExpertWeights):
        biases = (experts.fc1_bias_SH, experts.fc2_bias_SD)
        return quantized_expert_mlp_op(*rows, *experts.parts, *biases, slots, experts.activation)
    assert isinstance(experts, ExpertWeights), "others are a misfit"
    main, keep = experts.main_grads, torch.is_grad_enabled()
    sums: tuple[Tensor | None, ...] = (None,) * 4
    if main is not None and keep:
        main.begin_with_zeros()  # the operator's backward only adds
        sums = main.totals
    return expert_mlp_op(*rows, *experts.parameters, slots, *sums, experts.activation, keep)[0]


def _experts(parameters: Parameters, slots: Sequence[int] | None, activation: str) -> ExpertWeights:
    fc1_SHD, fc2_SDF, *biases = parameters
    table = None if slots is None else tuple(slots)
    return ExpertWeights.of(
        (fc1_SHD, fc2_SDF, *biases), slot_of_E=table, activation=_named(activation)
    )


@torch.no_grad()
def _without_gradients(
    x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, experts: SlotWeights
) -> Tensor:
    waves = CppWaves(x_TD, experts_TK, weights_TK)
    waves.add(experts)
    return waves.result()


def _named(activation: str) -> Activation:
    return ACTIVATIONS[ACTIVATIONS.index(activation)]  # type: ignore[arg-type]


@torch.library.custom_op("moeyard::expert_mlp_cpu", mutates_args=(), device_types="cpu")
def expert_mlp_op(
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    fc1_SHD: Tensor,
    fc2_SDF: Tensor,
    bias1_SH: Tensor | None,
    bias2_SD: Tensor | None,
    slots: Sequence[int] | None,
    main1_SHD: Tensor | None,
    main2_SDF: Tensor | None,
    main_bias1_SH: Tensor | None,
    main_bias2_SD: Tensor | None,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Return y ``[T, D]`` and, with ``keep``, what backward needs of each row, ``[R, H]``.

    Arguments that begin with ``main`` are not read; backward adds parameter gradients to them.
    """
    experts = _experts((fc1_SHD, fc2_SDF, bias1_SH, bias2_SD), slots, activation)
    if keep:
        return forward_kept(x_TD, experts_TK, weights_TK, experts)
    nothing_RH = x_TD.new_empty(0, fc1_SHD.shape[1])
    return _without_gradients(x_TD, experts_TK, weights_TK, experts), nothing_RH


@expert_mlp_op.register_fake
def _(x_TD: Tensor, experts_TK: Tensor, _: Tensor, fc1_SHD: Tensor, *others: Any) -> Any:
    keep = others[-1]
    return torch.empty_like(x_TD), x_TD.new_empty(
        experts_TK.numel() if keep else 0, fc1_SHD.shape[1]
    )


@torch.library.custom_op(
    "moeyard::expert_mlp_cpu_backward",
    mutates_args=("out1_SHD", "out2_SDF", "out_bias1_SH", "out_bias2_SD"),
    device_types="cpu",
)
def expert_mlp_backward_op(
    grad_TD: Tensor,
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    hidden_RH: Tensor,
    fc1_SHD: Tensor,
    fc2_SDF: Tensor,
    bias1_SH: Tensor | None,
    bias2_SD: Tensor | None,
    slots: Sequence[int] | None,
    activation: str,
    add: bool,
    out1_SHD: Tensor | None,
    out2_SDF: Tensor | None,
    out_bias1_SH: Tensor | None,
    out_bias2_SD: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and of the routing weights.

    Parameter gradients are written to the arguments that begin with ``out`` (fp32 or x's type), or
    added to them (fp32) with ``add``; None = not wanted.
    """
    experts = _experts((fc1_SHD, fc2_SDF, bias1_SH, bias2_SD), slots, activation)
    sums = MainGrads.of((out1_SHD, out2_SDF, out_bias1_SH, out_bias2_SD), is_empty=not add)
    return gradients(grad_TD, x_TD, experts_TK, weights_TK, hidden_RH, experts, sums)


@expert_mlp_backward_op.register_fake
def _(_: Tensor, x_TD: Tensor, __: Tensor, weights_TK: Tensor, *others: Any) -> Any:
    return torch.empty_like(x_TD), torch.empty_like(weights_TK)


def _keep(ctx: Any, inputs: tuple, output: tuple) -> None:
    x_TD, experts_TK, weights_TK, *parameters = inputs[:7]
    slots, *main, activation, _ = inputs[7:]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x_TD, experts_TK, weights_TK, output[1], *parameters)
    # Not saved tensors: other layers and micro-batches change them before backward comes.
    ctx.main, ctx.slots, ctx.activation = main, slots, activation


def _backward(ctx: Any, grad_TD: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad_TD is None:
        return (None,) * 14
    *rows, fc1_SHD, fc2_SDF, bias1_SH, bias2_SD = ctx.saved_tensors
    parameters = (fc1_SHD, fc2_SDF, bias1_SH, bias2_SD)
    add = ctx.main[0] is not None
    outs = ctx.main
    if not add:
        outs = MainGrads.empty_for(parameters, ctx.needs_input_grad[3:7]).totals
    grad_x_TD, grad_weights_TK = expert_mlp_backward_op(
        *(grad_TD.contiguous(), *rows, *parameters, ctx.slots, ctx.activation, add, *outs)
    )
    grads = (None,) * 4 if add else outs
    return (grad_x_TD, None, grad_weights_TK, *grads, *(None,) * 7)


expert_mlp_op.register_autograd(_backward, setup_context=_keep)


@torch.library.custom_op("moeyard::quantized_expert_mlp_cpu", mutates_args=(), device_types="cpu")
def quantized_expert_mlp_op(
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    values1: Tensor,
    scales1_SHG: Tensor,
    values2: Tensor,
    scales2_SDG: Tensor,
    bias1_SH: Tensor | None,
    bias2_SD: Tensor | None,
    slots: Sequence[int] | None,
    activation: str,
) -> Tensor:
    """Return y ``[T, D]`` of experts in 8 or 4 bits; has no gradient."""
    table = None if slots is None else tuple(slots)
    matrices = QuantizedMatrices(values1, scales1_SHG), QuantizedMatrices(values2, scales2_SDG)
    experts = QuantizedExpertWeights(
        *matrices,
        slot_of_E=table,
        activation=_named(activation),
        fc1_bias_SH=bias1_SH,
        fc2_bias_SD=bias2_SD,
    )
    return _without_gradients(x_TD, experts_TK, weights_TK, experts)


@quantized_expert_mlp_op.register_fake
def _(x_TD: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(x_TD)
