"""The expert MLP on the C++ kernels: which calls they support, and running one.

T tokens, K choices, D model width.
"""

import torch
from torch import Tensor

from ..values.calls import ExpertCall
from ..values.expert_weights import ExpertWeights
from .experts import CppWaves, can_run
from .ops import can_compile, expert_mlp_compiled
from .training import CppExpertMLP, can_train


def misfit(call: ExpertCall) -> str | None:
    """Return one sentence on what the kernels do not support in a call, or None."""
    x_TD, _, weights_TK = call.rows
    experts = call.experts
    if torch.compiler.is_compiling():
        fits = can_compile(x_TD, weights_TK, experts)
    elif not torch.is_grad_enabled():
        fits = can_run(x_TD, weights_TK, experts)
    elif isinstance(experts, ExpertWeights):
        fits = can_train(x_TD, weights_TK, experts)
    else:  # quantized experts have no backward
        with torch.no_grad():
            fits = can_run(x_TD, weights_TK, experts)
    if fits:
        return None
    return f"the C++ kernels do not take {x_TD.dtype} rows, or these experts, on {x_TD.device}."


def run(call: ExpertCall) -> Tensor:
    """Return ``y_t = sum_k weights[t, k] * MLP_{experts[t, k]}(x_t)``, ``[T, D]``, summed in fp32.

    Raises ``ValueError`` for expert ids out of range.
    """
    experts = call.experts
    if torch.compiler.is_compiling():
        return expert_mlp_compiled(*call.rows, experts)
    if not torch.is_grad_enabled():
        return _infer(call)
    if isinstance(experts, ExpertWeights):
        y_TD: Tensor = CppExpertMLP.apply(*call.rows, *experts.parameters, experts, call.recompute)
        return y_TD
    with torch.no_grad():
        return _infer(call)


def _infer(call: ExpertCall) -> Tensor:
    waves = CppWaves(*call.rows)
    waves.add(call.experts)
    return waves.result()
