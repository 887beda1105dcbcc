"""The expert MLP on Triton's kernels: which calls they support, and running one.

T tokens, K choices, E experts, S slots, D model width, F expert width, H rows
of fc1.
"""

import functools

import torch
from torch import Tensor

from ..values.calls import ExpertCall
from ..values.channel_weights import ChannelExpertWeights
from ..values.expert_weights import ExpertWeights
from ..values.group_sparse import GroupSparseExpertWeights
from ..values.quantized_weights import QuantizedExpertWeights
from ..values.two_of_four import TwoOfFourExpertWeights

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

MOST_ELEMENTS = 2**31
"""Kernels count the elements of one expert's matrix, and routed rows, in 32 bits."""


def misfit(call: ExpertCall) -> str | None:
    """Return one sentence on what the kernels do not support in a call, or None."""
    x_TD, experts_TK, weights_TK = call.rows
    experts = call.experts
    if x_TD.dtype not in DTYPES:
        return f"Triton's expert kernels take bf16, fp16 and fp32, not {x_TD.dtype}."
    if isinstance(experts, GroupSparseExpertWeights):
        return "Triton's kernels do not take group-sparse experts."
    if isinstance(experts, TwoOfFourExpertWeights):
        return "Triton's kernels do not take 2:4 experts."
    if isinstance(experts, QuantizedExpertWeights):
        sums: list[Tensor] = []
    elif isinstance(experts, ChannelExpertWeights):
        return "Triton does not take experts stored by channel."
    else:
        main = experts.main_grads
        sums = [] if main is None else [total for total in main.totals if total is not None]
        if experts.fc2_SDF.dtype != experts.fc1_SHD.dtype:
            return (
                f"fc1 has type {experts.fc1_SHD.dtype} and fc2 {experts.fc2_SDF.dtype}; they must "
                "have one."
            )
    parts = _parts(experts)
    tensors = (x_TD, experts_TK, weights_TK, *parts.values(), *experts.bias_parts, *sums)
    devices = {str(tensor.device) for tensor in tensors}
    if len(devices) > 1:
        return f"The tensors are on {', '.join(sorted(devices))}; they must share one device."
    for name, part in parts.items():
        if part.stride(2) != 1 or part.stride(1) != part.shape[2]:
            return f"{name} has strides {part.stride()}; a slot's matrix must be contiguous."
    for bias in experts.bias_parts:
        if bias.stride(1) != 1 or bias.dtype not in DTYPES:
            return (
                f"A bias has strides {bias.stride()} and type {bias.dtype}; a slot's must be "
                "contiguous, in bf16, fp16 or fp32."
            )
    if not all(total.is_contiguous() for total in sums):
        return "The main gradients are not contiguous, as Triton's kernels need them."
    if max(*(part[:1].numel() for part in parts.values()), experts_TK.numel()) >= MOST_ELEMENTS:
        return "One expert's matrix, or the routed rows, have 2^31 elements or more."
    return None


def run(call: ExpertCall) -> Tensor:
    """Return ``y_t = sum_k weights[t, k] * MLP_{experts[t, k]}(x_t)``, ``[T, D]``, summed in fp32.

    Ids outside ``[-1, E)`` count as -1.
    """
    x_TD, experts_TK, weights_TK = call.rows
    experts = call.experts
    slot_of_E = None
    if experts.slot_of_E is not None:
        slot_of_E = _slot_table(tuple(experts.slot_of_E), x_TD.device)
    rows = (x_TD.contiguous(), experts_TK.contiguous(), weights_TK.contiguous())
    if isinstance(experts, QuantizedExpertWeights):
        return _run_quantized(*rows, experts, slot_of_E)
    assert isinstance(experts, ExpertWeights), "others are a misfit"
    from .ops import expert_mlp_op

    leaves = [leaf for leaf in (x_TD, weights_TK, *experts.parameters) if leaf is not None]
    has_backward = torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves)
    sums: tuple[Tensor | None, ...] = (None,) * 4
    if experts.main_grads is not None:
        if has_backward:
            experts.main_grads.begin_with_zeros()  # the operator's backward only adds
        sums = experts.main_grads.totals
    most_rows = experts_TK.numel()
    if call.most_choices is not None and call.most_choices < most_rows:
        most_rows = call.most_choices
        # More rows would be written beyond the room for them. The device stops, the host goes on.
        torch._assert_async((experts_TK >= 0).sum() <= most_rows, "most_choices is too low")
    return expert_mlp_op(
        *rows,
        *experts.parameters,
        slot_of_E,
        *sums,
        experts.activation,
        has_backward and not call.recompute,
        most_rows,
    )[0]


def _run_quantized(
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    experts: QuantizedExpertWeights,
    slot_of_E: Tensor | None,
) -> Tensor:
    from .quantized_ops import quantized_expert_mlp_op

    fc1, fc2 = experts.fc1, experts.fc2
    parts = (fc1.values, fc1.scales_SQG, fc2.values, fc2.scales_SQG)
    biases = (experts.fc1_bias_SH, experts.fc2_bias_SD)
    return quantized_expert_mlp_op(
        x_TD, experts_TK, weights_TK, *parts, *biases, slot_of_E, experts.activation
    )


def _parts(experts: ExpertWeights | QuantizedExpertWeights) -> dict[str, Tensor]:
    """Return the tensors that hold the matrices of all slots."""
    if isinstance(experts, QuantizedExpertWeights):
        return {
            "fc1.values": experts.fc1.values,
            "fc1.scales": experts.fc1.scales_SQG,
            "fc2.values": experts.fc2.values,
            "fc2.scales": experts.fc2.scales_SQG,
        }
    assert isinstance(experts, ExpertWeights), "others are a misfit"
    return {"fc1": experts.fc1_SHD, "fc2": experts.fc2_SDF}


@functools.lru_cache(maxsize=256)
def _slot_table(slot_of_E: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the table on the device; copying it waits for the device, so it is copied once."""
    return torch.tensor(slot_of_E, dtype=torch.int32, device=device)
