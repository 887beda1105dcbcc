"""The Triton backend's door: where it can run, whether it may be trusted, and what it is given.

Triton itself is imported only behind :func:`why_not`, so that machines without it import the rest.

T tokens, K choices, E experts, S slots, D model width, F expert width, H = 2F.
"""

import functools
import importlib.util
import os
import warnings

import torch
from torch import Tensor

from ..torch_ops.router import ChoiceRule, Choices, LossSums, where_valid
from ..values.quantized_weights import AnyExperts, Bits, QuantizedExpertWeights

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

MAX_EXPERTS = 1024
"""Experts that the router takes; with padding between groups up to twice as many lanes of a tile,
the most that does not spill."""

MIN_CAPABILITY = (8, 0)
"""The first GPUs with bf16 tensor cores and asynchronous copies (Ampere)."""


def why_not(device: torch.device) -> str | None:
    """Say in one sentence why the kernels cannot run on ``device``, or None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; it comes with PyTorch's CUDA build."
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None  # Triton then runs kernels on the CPU, slowly, to test them
    if device.type != "cuda":
        return "Triton needs a CUDA device."
    if torch.version.hip is not None:
        return "Triton's kernels here are written and checked for NVIDIA GPUs only."
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        found = ".".join(map(str, capability))
        return f"Triton needs compute capability 8.0 or newer; this GPU has {found}."
    return None


def is_chosen(x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, experts: AnyExperts) -> bool:
    """Say whether the automatic choice falls on Triton for this call.

    The first call of a type on a device checks the kernels there, which compiles them and waits for
    the device. While torch.compile traces or a CUDA graph captures, nothing can be checked: then
    only what was found before counts.
    """
    if not x_TD.is_cuda or _misfit(x_TD, experts_TK, weights_TK, experts) is not None:
        return False
    kinds: set[Bits | None] = {None}
    if isinstance(experts, QuantizedExpertWeights):
        kinds = {experts.fc1.bits, experts.fc2.bits}
    has_bias = bool(experts.bias_parts)
    checks = [(x_TD.dtype, x_TD.device, bits, has_bias) for bits in kinds]
    if torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return all(_VERDICTS.get(check, False) for check in checks)
    return why_not(x_TD.device) is None and all(_is_trusted(*check) for check in checks)


_VERDICTS: dict[tuple[torch.dtype, torch.device, Bits | None, bool], bool] = {}
"""What the self-check found; the kernels of weights in 8 and 4 bits are checked by themselves, and
so are those that add biases."""


def _is_trusted(
    dtype: torch.dtype, device: torch.device, bits: Bits | None, has_bias: bool
) -> bool:
    """Check the kernels against the reference, once per type and device; warn where they fail.

    Compilers have miscompiled such kernels without a word on single architectures.
    """
    check = (dtype, device, bits, has_bias)
    if check not in _VERDICTS:
        _VERDICTS[check] = _passes(*check)
    return _VERDICTS[check]


def _passes(dtype: torch.dtype, device: torch.device, bits: Bits | None, has_bias: bool) -> bool:
    from ..checks import experts as self_check  # it checks this backend and imports us

    if bits is None:
        sizes = (self_check.T, self_check.MANY_TOKENS)
        call = functools.partial(self_check.check_backend, "triton", dtype, str(device))
        checks = [functools.partial(call, num_tokens, has_bias) for num_tokens in sizes]
    else:
        call = functools.partial(self_check.check_quantized, "triton", dtype, str(device))
        checks = [functools.partial(call, bits, has_bias)]
    for run in checks:
        with torch.inference_mode(False), torch.enable_grad():
            check = run()
        if not check.passed:
            worst = max(check.errors.values(), default=float("nan"))
            reason = check.problem or f"the largest error is {worst:.0e}, the limit {check.limit}"
            kind = "expert kernels" if bits is None else f"kernels for {bits}-bit experts"
            warnings.warn(
                f"Triton's {kind} do not pass their self-check for {check.dtype} on "
                f"{device} ({reason}); using the torch backend. `moeyard doctor` says more.",
                stacklevel=4,
            )
            return False
    return True


def is_router_chosen(logits_TE: Tensor) -> bool:
    """Say whether the automatic choice falls on Triton for these logits; see :func:`is_chosen`."""
    if not logits_TE.is_cuda or _router_misfit(logits_TE) is not None:
        return False
    device = logits_TE.device
    if torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return _ROUTER_VERDICTS.get(device, False)
    return why_not(device) is None and _is_router_trusted(device)


_ROUTER_VERDICTS: dict[torch.device, bool] = {}
"""What the router's self-check found."""


def _is_router_trusted(device: torch.device) -> bool:
    """Check the router's kernels against torch's, once per device; warn where they fail."""
    if device not in _ROUTER_VERDICTS:
        from ..checks.router import problem_with_triton

        with torch.inference_mode(False), torch.enable_grad():
            problem = problem_with_triton(device)
        _ROUTER_VERDICTS[device] = problem is None
        if problem is not None:
            warnings.warn(
                f"Triton's router does not pass its self-check on {device} ({problem}); using "
                "torch's operators.",
                stacklevel=4,
            )
    return _ROUTER_VERDICTS[device]


def choose_triton(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    valid_T: Tensor | None,
    rule: ChoiceRule,
    wants_sums: bool,
) -> Choices:
    """Choose in one pass over the logits; equal scores go to the lower id.

    Raises ``ValueError`` where the kernels cannot run and for what they do not take.
    """
    problem = _router_misfit(logits_TE)
    if not torch.compiler.is_compiling():  # it cannot follow how we look around
        problem = why_not(logits_TE.device) or problem
    if problem is not None:
        raise ValueError(f"{problem} Use backend 'torch'.")
    from .router_ops import route_op

    chosen_TK, weights_TK, counts_E, sums_E, z_sum = route_op(
        logits_TE.contiguous(),
        None if bias_E is None else bias_E.float().contiguous(),
        None if valid_T is None else valid_T.contiguous(),
        rule.k,
        rule.score == "sigmoid",
        rule.renormalize,
        rule.scale,
        rule.num_groups,
        rule.top_groups,
        rule.group_best,
        wants_sums,
    )
    sums = LossSums(sums_E, z_sum) if wants_sums else None
    return Choices(where_valid(valid_T, chosen_TK), weights_TK, counts_E, sums)


def _router_misfit(logits_TE: Tensor) -> str | None:
    """Say what the router's kernels do not take about these logits."""
    if logits_TE.dtype != torch.float32:
        return f"Triton's router takes fp32 logits, not {logits_TE.dtype}."
    if logits_TE.shape[1] > MAX_EXPERTS:
        return f"Triton's router takes at most {MAX_EXPERTS} experts, not {logits_TE.shape[1]}."
    return None


def expert_mlp_triton(
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    experts: AnyExperts,
    recompute: bool = False,
) -> Tensor:
    """Return ``y_t = sum_k weights[t, k] * MLP_{experts[t, k]}(x_t)``, ``[T, D]``, summed in fp32.

    ``recompute`` runs fc1 again in backward. Ids outside ``[-1, E)`` count as -1. Raises
    ``ValueError`` where the kernels cannot run and for types, devices and layouts they do not take.
    """
    problem = _misfit(x_TD, experts_TK, weights_TK, experts)
    if not torch.compiler.is_compiling():  # it cannot follow how we look around
        problem = why_not(x_TD.device) or problem
    if problem is not None:
        raise ValueError(f"{problem} Use backend 'torch'.")
    slot_of_E = None
    if experts.slot_of_E is not None:
        slot_of_E = _slot_table(experts.slot_of_E, x_TD.device)
    rows = (x_TD.contiguous(), experts_TK.contiguous(), weights_TK.contiguous())
    if isinstance(experts, QuantizedExpertWeights):
        return _quantized(*rows, experts, slot_of_E)
    from .ops import expert_mlp_op

    leaves = [leaf for leaf in (x_TD, weights_TK, *experts.parameters) if leaf is not None]
    has_backward = torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves)
    sums: tuple[Tensor | None, ...] = (None,) * 4
    if experts.main_grads is not None:
        if has_backward:
            experts.main_grads.begin_with_zeros()  # the operator's backward only adds
        sums = experts.main_grads.totals
    return expert_mlp_op(
        *rows,
        *experts.parameters,
        slot_of_E,
        *sums,
        experts.activation,
        has_backward and not recompute,
    )[0]


def _quantized(
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


def _misfit(
    x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, experts: AnyExperts
) -> str | None:
    """Say what the kernels do not take about these arguments."""
    if x_TD.dtype not in DTYPES:
        return f"Triton's expert kernels take bf16, fp16 and fp32, not {x_TD.dtype}."
    if isinstance(experts, QuantizedExpertWeights):
        parts = {
            "fc1.values": experts.fc1.values,
            "fc1.scales": experts.fc1.scales_SQG,
            "fc2.values": experts.fc2.values,
            "fc2.scales": experts.fc2.scales_SQG,
        }
        sums: list[Tensor] = []
    else:
        parts = {"fc1": experts.fc1_SHD, "fc2": experts.fc2_SDF}
        main = experts.main_grads
        sums = [] if main is None else [total for total in main.totals if total is not None]
        if experts.fc2_SDF.dtype != experts.fc1_SHD.dtype:
            return (
                f"fc1 has type {experts.fc1_SHD.dtype} and fc2 {experts.fc2_SDF.dtype}; they must "
                "have one."
            )
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
    if max(*(part[:1].numel() for part in parts.values()), experts_TK.numel()) >= 2**31:
        return "One expert's matrix, or the routed rows, have 2^31 elements or more."
    return None


@functools.lru_cache(maxsize=256)
def _slot_table(slot_of_E: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the table on the device; sending it waits for the device, so it is sent once."""
    return torch.tensor(slot_of_E, dtype=torch.int32, device=device)
