"""The expert MLP: one call, several backends.

T tokens, K choices, R = T*K routed rows, D model width, F expert width.
"""

from typing import Literal

import torch
from torch import Tensor

from .cpu.experts import can_run
from .cpu.library import load
from .cpu.ops import can_compile, expert_mlp_compiled
from .cpu.training import CppExpertMLP, can_train
from .gpu.door import expert_mlp_triton, is_chosen
from .torch_ops.experts import ExpertMLP
from .torch_ops.megablocks import expert_mlp_megablocks
from .torch_ops.reference import expert_mlp_reference
from .values.expert_weights import ExpertWeights
from .values.quantized_weights import AnyExperts, QuantizedExpertWeights
from .waves import CppWaves, TorchWaves, Waves

Backend = Literal["auto", "torch", "reference", "cpp", "triton", "megablocks"]
"""``auto`` is Triton on a GPU where its kernels pass their self-check, C++ on a CPU where those
could be built and pass theirs, and torch elsewhere (docs/backends.md)."""


def expert_mlp(
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    experts: AnyExperts,
    backend: Backend = "auto",
    *,
    recompute: bool = False,
) -> Tensor:
    """Return ``y_t = sum_k weights[t, k] * MLP_{experts[t, k]}(x_t)``, ``[T, D]`` in x's dtype.

    ``experts_TK`` holds logical expert ids, -1 for no expert; ``weights_TK`` may be wider than x
    (fp32 beside bf16), and the sum over k runs in that type. Differentiable in x, the weights,
    fc1, fc2 and their biases, unless the experts are quantized. ``recompute`` keeps x only and
    computes fc1 again in backward: two thirds of the forward work more, R * 2F elements kept less;
    the gradients are the same bits (the reference keeps what autograd does, a graph compiled for a
    CPU keeps all).
    Raises ``ValueError`` for shapes that do not fit, ids out of range, gradients of quantized
    experts, and a backend that cannot run here.
    """
    _check(x_TD, experts_TK, weights_TK, experts)
    if backend == "reference":
        return expert_mlp_reference(x_TD, experts_TK, weights_TK, experts)
    wants_grad = torch.is_grad_enabled() and (x_TD.requires_grad or weights_TK.requires_grad)
    if isinstance(experts, QuantizedExpertWeights) and wants_grad:
        raise ValueError(
            "x or the routing weights want gradients, but quantized experts have no backward; "
            "run under torch.no_grad() or with plain weights."
        )
    if backend == "triton" or (
        backend == "auto" and is_chosen(x_TD, experts_TK, weights_TK, experts)
    ):
        return expert_mlp_triton(x_TD, experts_TK, weights_TK, experts, recompute)
    if backend == "megablocks":
        return expert_mlp_megablocks(x_TD, experts_TK, weights_TK, experts, recompute)
    if (
        torch.compiler.is_compiling()
        and backend != "torch"
        and can_compile(x_TD, weights_TK, experts)
    ):
        return expert_mlp_compiled(x_TD, experts_TK, weights_TK, experts)
    if isinstance(experts, QuantizedExpertWeights):
        with torch.no_grad():
            return _run_waves(x_TD, experts_TK, weights_TK, experts, backend)
    if torch.is_grad_enabled():
        is_cpp = _is_cpp(backend, can_train(x_TD, weights_TK, experts), x_TD)
        mlp = CppExpertMLP if is_cpp else ExpertMLP
        return mlp.apply(x_TD, experts_TK, weights_TK, *experts.parameters, experts, recompute)
    return _run_waves(x_TD, experts_TK, weights_TK, experts, backend)


def _check(x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, experts: AnyExperts) -> None:
    """Raise ``ValueError`` for what no backend takes."""
    x, ids, weights = (tuple(tensor.shape) for tensor in (x_TD, experts_TK, weights_TK))
    if not (len(x) == len(ids) == 2 and ids == weights and x[0] == ids[0]):
        raise ValueError(
            f"x {x}, experts {ids} and weights {weights} do not fit; they must be [T, D], [T, K] "
            "and [T, K]."
        )
    if experts_TK.dtype not in (torch.int32, torch.int64) or not weights_TK.is_floating_point():
        raise ValueError(
            f"experts have type {experts_TK.dtype} and weights {weights_TK.dtype}; experts must be "
            "int32 or int64, and weights floating point."
        )
    if isinstance(experts, ExpertWeights):
        one, dtype = experts.fc1_SHD, experts.fc1_SHD.dtype
    else:
        one, dtype = experts.fc1.values, x_TD.dtype
    if x[1] != experts.d_model or x_TD.dtype != dtype:
        raise ValueError(
            f"x has width {x[1]} and type {x_TD.dtype}, but the experts take {experts.d_model} and "
            f"{dtype}."
        )
    devices = {str(tensor.device) for tensor in (x_TD, experts_TK, weights_TK, one)}
    if len(devices) > 1:
        raise ValueError(
            f"x, experts, weights and fc1 are on {' and '.join(sorted(devices))}; move them to one "
            "device."
        )


def _run_waves(
    x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, experts: AnyExperts, backend: Backend
) -> Tensor:
    """Run all experts in one wave, without gradients."""
    waves: Waves
    if _is_cpp(backend, can_run(x_TD, weights_TK, experts), x_TD):
        waves = CppWaves(x_TD, experts_TK, weights_TK)
    else:
        waves = TorchWaves(x_TD, experts_TK, weights_TK, experts.num_experts)
    waves.add(experts)
    return waves.result()


def _is_cpp(backend: Backend, takes_them: bool, x_TD: Tensor) -> bool:
    """Say whether the C++ kernels run; raise ``ValueError`` where they were asked for in vain."""
    if backend == "cpp" and not takes_them:
        raise ValueError(
            f"backend is 'cpp', which does not take {x_TD.dtype} rows on {x_TD.device} here (C++ "
            f"kernels: {load().state}); use 'auto'."
        )
    return backend != "torch" and takes_them
