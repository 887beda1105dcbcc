"""The Triton expert MLP as ``torch.library`` operators with fake versions and a gradient.

Saved for backward: x, fc1's outputs (pre-activations), the routing weights and the indices;
2 T D + 2 R H bytes in 16 bits, plus the indices. Without ``keep_h`` only x, the routing weights and
the indices are saved (2 T D bytes), and backward computes fc1's outputs again.

T tokens, K choices, R = T*K routed rows in slot order, E experts, S slots, L tiles, D model width,
F expert width, H rows of fc1. Rows without a slot come last, and the caller may know that they are
many: tensors of values per row then end after ``most_rows``.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from .bias_grad import bias_grad
from .combine import combine
from .device import is_hopper, on_device_of
from .grad_hidden import grad_hidden
from .grouped_matmul import grouped_matmul
from .grouping import SlotGroups, group_rows, max_tiles
from .tiles import Kernel, Tiles, tile_rows, tiles_for
from .up_projection import up_projection
from .weight_grad import weight_grad

PRECISION = {torch.float32: "tf32x3", torch.float16: "ieee", torch.bfloat16: "ieee"}
"""How products run: fp32 as three TF32 products, which keeps fp32's accuracy on tensor cores."""


@torch.library.custom_op("moeyard::expert_mlp", mutates_args=())
def expert_mlp_op(
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    fc1_SHD: Tensor,
    fc2_SDF: Tensor,
    bias1_SH: Tensor | None,
    bias2_SD: Tensor | None,
    slot_of_E: Tensor | None,
    main1_SHD: Tensor | None,
    main2_SDF: Tensor | None,
    main_bias1_SH: Tensor | None,
    main_bias2_SD: Tensor | None,
    activation: str,
    keep_h: bool,
    most_rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return y ``[T, D]``, then what backward needs: h ``[R, H]`` and the ``SlotGroups``.

    Without ``keep_h`` h is empty, and backward computes it again. Arguments that begin with
    ``main`` are not read; backward adds parameter gradients to them. At most ``most_rows`` of the
    R rows have a slot.
    """
    num_tokens, d_model = x_TD.shape
    d_expert = fc2_SDF.shape[2]
    plan = _Plan(x_TD, most_rows, _num_experts(fc1_SHD, slot_of_E))
    h_RH = x_TD.new_empty(most_rows if keep_h else 0, fc1_SHD.shape[1])
    with on_device_of(x_TD):
        groups = group_rows(experts_TK, slot_of_E, fc1_SHD.shape[0], plan.rows, most_rows)
        if most_rows == 0:
            return x_TD.new_zeros(num_tokens, d_model), h_RH, *groups
        a_RF = x_TD.new_empty(most_rows, d_expert)
        precision, h_out = plan.precision, h_RH if keep_h else None
        first = (fc1_SHD, bias1_SH, activation, precision, plan.tiles("up"))
        up_projection(x_TD, groups, *first, a_RF, h_out)
        fc2_SFD = fc2_SDF.transpose(1, 2)
        y_RD = grouped_matmul(a_RF, fc2_SFD, bias2_SD, groups, precision, plan.tiles("matmul"))
        return combine(y_RD, groups, weights_TK, num_tokens), h_RH, *groups


@expert_mlp_op.register_fake
def _(x_TD: Tensor, experts_TK: Tensor, _: Tensor, fc1_SHD: Tensor, *others: Any) -> Any:
    slot_of_E, keep_h, most_rows = others[3], *others[-2:]
    num_rows, num_slots = experts_TK.numel(), fc1_SHD.shape[0]
    rows = tile_rows(most_rows, _num_experts(fc1_SHD, slot_of_E))
    num_tiles = max_tiles(most_rows, num_slots, rows)
    indices = functools.partial(x_TD.new_empty, dtype=torch.int32)
    return (
        torch.empty_like(x_TD),
        x_TD.new_empty(most_rows if keep_h else 0, fc1_SHD.shape[1]),
        indices(num_rows),
        indices(num_rows),
        indices(num_slots + 1),
        indices(num_tiles, 2),
    )


@torch.library.custom_op(
    "moeyard::expert_mlp_backward",
    mutates_args=("out1_SHD", "out2_SDF", "out_bias1_SH", "out_bias2_SD"),
)
def expert_mlp_backward_op(
    grad_TD: Tensor,
    x_TD: Tensor,
    weights_TK: Tensor,
    h_RH: Tensor,
    order_R: Tensor,
    inverse_R: Tensor,
    offsets_S1: Tensor,
    tiles_L2: Tensor,
    fc1_SHD: Tensor,
    fc2_SDF: Tensor,
    bias1_SH: Tensor | None,
    bias2_SD: Tensor | None,
    num_experts: int,
    most_rows: int,
    activation: str,
    wants_x: bool,
    add: bool,
    out1_SHD: Tensor | None,
    out2_SDF: Tensor | None,
    out_bias1_SH: Tensor | None,
    out_bias2_SD: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x (empty unless ``wants_x``) and of the routing weights.

    Parameter gradients are written to the arguments that begin with ``out``, or added to them with
    ``add``. An empty h is computed again.
    """
    num_choices = weights_TK.shape[1]
    if most_rows == 0:
        for out in (out1_SHD, out2_SDF, out_bias1_SH, out_bias2_SD):
            if out is not None and not add:
                out.zero_()
        return torch.zeros_like(x_TD if wants_x else x_TD[:0]), torch.zeros_like(weights_TK)
    groups = SlotGroups(order_R, inverse_R, offsets_S1, tiles_L2)
    plan = _Plan(x_TD, most_rows, num_experts)
    precision = plan.precision
    write_grad = functools.partial(
        weight_grad,
        precision=precision,
        tiles=plan.tiles("weight_sum" if add else "weight_grad"),
        num_choices=num_choices,
        add=add,
    )
    with on_device_of(x_TD):
        if h_RH.shape[0] == 0:
            h_RH = x_TD.new_empty(most_rows, fc1_SHD.shape[1])
            first = (fc1_SHD, bias1_SH, activation, precision, plan.tiles("up"))
            up_projection(x_TD, groups, *first, None, h_RH)
        tiles = plan.tiles("grad_hidden")
        grad_h_RH, scaled_RF, grad_weights_TK = grad_hidden(
            grad_TD, groups, weights_TK, h_RH, fc2_SDF, bias2_SD, activation, precision, tiles
        )
        if out2_SDF is not None:
            write_grad(grad_TD, scaled_RF, groups, out2_SDF, left_is_by_token=True)
        del scaled_RF
        if out1_SHD is not None:
            write_grad(grad_h_RH, x_TD, groups, out1_SHD, left_is_by_token=False)
        if out_bias1_SH is not None:
            bias_grad(grad_h_RH, groups, None, out_bias1_SH, add)
        if out_bias2_SD is not None:
            bias_grad(grad_TD, groups, weights_TK, out_bias2_SD, add)
        if not wants_x:
            return torch.empty_like(x_TD[:0]), grad_weights_TK
        tiles = plan.tiles("matmul")
        grad_x_RD = grouped_matmul(grad_h_RH, fc1_SHD, None, groups, precision, tiles)
        return combine(grad_x_RD, groups, None, x_TD.shape[0]), grad_weights_TK


@expert_mlp_backward_op.register_fake
def _(_: Tensor, x_TD: Tensor, weights_TK: Tensor, *others: Any) -> Any:
    wants_x = others[12]
    return torch.empty_like(x_TD if wants_x else x_TD[:0]), torch.empty_like(weights_TK)


def _keep(ctx: Any, inputs: tuple, output: tuple) -> None:
    x_TD, _, weights_TK, *parameters = inputs[:7]
    slot_of_E, *main, activation, _, most_rows = inputs[7:]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x_TD, weights_TK, *output[1:], *parameters)
    # Not saved tensors: other layers and micro-batches change them before backward comes.
    ctx.main = main
    ctx.num_experts = _num_experts(parameters[0], slot_of_E)
    ctx.activation = activation
    ctx.most_rows = most_rows


def _backward(ctx: Any, grad_TD: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_TD is None:
        return (None,) * 15
    wants = ctx.needs_input_grad
    saved = ctx.saved_tensors  # read once: checkpointing allows a single access
    parameters = saved[-4:]
    add = ctx.main[0] is not None
    outs = ctx.main
    if not add:
        pairs = zip(parameters, wants[3:7], strict=True)
        outs = [torch.empty_like(part) if wanted else None for part, wanted in pairs]
    grad_x_TD, grad_weights_TK = expert_mlp_backward_op(
        *(grad_TD.contiguous(), *saved, ctx.num_experts, ctx.most_rows, ctx.activation),
        *(wants[0], add, *outs),
    )
    grads = (None,) * 4 if add else outs
    grad_x = grad_x_TD if wants[0] else None
    grad_weights = grad_weights_TK if wants[2] else None
    return (grad_x, None, grad_weights, *grads, *(None,) * 8)


expert_mlp_op.register_autograd(_backward, setup_context=_keep)


class _Plan:
    """The tiles of one call. They depend on rows, experts and type, not on the number of slots."""

    def __init__(self, x_TD: Tensor, num_rows: int, num_experts: int) -> None:
        self.rows = tile_rows(num_rows, num_experts)
        self.dtype = x_TD.dtype
        self.precision = PRECISION[x_TD.dtype]
        self.is_hopper = is_hopper(x_TD)

    def tiles(self, kernel: Kernel) -> Tiles:
        return tiles_for(kernel, self.rows, self.dtype, self.is_hopper)


def _num_experts(fc1_SHD: Tensor, slot_of_E: Tensor | None) -> int:
    return fc1_SHD.shape[0] if slot_of_E is None else slot_of_E.numel()
