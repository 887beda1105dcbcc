"""The Triton router as ``torch.library`` operators with fake versions and a gradient.

Saved for backward: the logits and the chosen ids. T tokens, E experts, K choices.
"""

import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor

from ..values.choice import ChoiceRule
from .device import on_device_of
from .router import route
from .router_grad import route_grad

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _rule(k: int, is_sigmoid: bool, renormalize: bool, scale: float) -> ChoiceRule:
    score: Literal["softmax", "sigmoid"] = "sigmoid" if is_sigmoid else "softmax"
    return ChoiceRule(k=k, score=score, renormalize=renormalize, scale=scale)


@torch.library.custom_op("moeyard::route", mutates_args=())
def route_op(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    valid_T: Tensor | None,
    k: int,
    is_sigmoid: bool,
    renormalize: bool,
    scale: float,
    num_groups: int,
    top_groups: int,
    group_best: int,
    wants_sums: bool,
) -> Outputs:
    """Return chosen ids of all rows, weights, counts and the sums for losses; see ``route``."""
    rule = dataclasses.replace(
        _rule(k, is_sigmoid, renormalize, scale),
        num_groups=num_groups,
        top_groups=top_groups,
        group_best=group_best,
    )
    with on_device_of(logits_TE):
        return route(logits_TE, bias_E, valid_T, rule, wants_sums)


@route_op.register_fake
def _(logits_TE: Tensor, _: Tensor | None, __: Tensor | None, k: int, *others: Any) -> Outputs:
    wants_sums = others[-1]
    num_tokens, num_experts = logits_TE.shape
    return (
        logits_TE.new_empty(num_tokens, k, dtype=torch.int32),
        logits_TE.new_empty(num_tokens, k),
        logits_TE.new_empty(num_experts, dtype=torch.int64),
        logits_TE.new_empty(num_experts if wants_sums else 0),
        logits_TE.new_empty(() if wants_sums else (0,)),
    )


@torch.library.custom_op("moeyard::route_backward", mutates_args=())
def route_backward_op(
    logits_TE: Tensor,
    chosen_TK: Tensor,
    valid_T: Tensor | None,
    grad_weights_TK: Tensor | None,
    grad_sums_E: Tensor | None,
    grad_z: Tensor | None,
    is_sigmoid: bool,
    renormalize: bool,
    scale: float,
) -> Tensor:
    """Return the gradient of the logits, ``[T, E]``."""
    rule = _rule(chosen_TK.shape[1], is_sigmoid, renormalize, scale)
    with on_device_of(logits_TE):
        grads = (grad_weights_TK, grad_sums_E, grad_z)
        return route_grad(logits_TE, chosen_TK, valid_T, rule, *grads)


@route_backward_op.register_fake
def _(logits_TE: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(logits_TE)


def _keep(ctx: Any, inputs: tuple, output: Outputs) -> None:
    logits_TE, _, valid_T, _, is_sigmoid, renormalize, scale, *_, wants_sums = inputs
    chosen_TK, _, counts_E, _, _ = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(chosen_TK, counts_E)
    ctx.save_for_backward(logits_TE, chosen_TK, valid_T)
    ctx.rule = (is_sigmoid, renormalize, scale)
    ctx.has_sums = wants_sums


def _backward(
    ctx: Any,
    _chosen: None,
    grad_weights_TK: Tensor | None,
    _counts: None,
    grad_sums_E: Tensor | None,
    grad_z: Tensor | None,
) -> tuple[Tensor | None, ...]:
    grads = (grad_weights_TK, grad_sums_E, grad_z)
    if not ctx.has_sums:
        grads = (grad_weights_TK, None, None)
    if all(grad is None for grad in grads):
        return (None,) * 11
    contiguous = (None if grad is None else grad.contiguous() for grad in grads)
    return (route_backward_op(*ctx.saved_tensors, *contiguous, *ctx.rule), *(None,) * 10)


route_op.register_autograd(_backward, setup_context=_keep)
