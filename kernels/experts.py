"""The expert MLP: one call, several backends.

T tokens, K choices, D model width.
"""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from .checks.experts import BackendCheck, check_backend, check_quantized
from .cpu import expert_mlp as cpp
from .gpu import device as gpu
from .gpu import experts as triton
from .torch_ops import experts as torch_experts
from .torch_ops import megablocks, reference
from .trust import cpp as cpp_library
from .trust import trusts_cpp, trusts_triton, why_not_cpp
from .values.calls import ExpertBackend, ExpertCall
from .values.expert_weights import ExpertWeights
from .values.few_bits import FewBitsExpertWeights
from .values.quantized_weights import SlotWeights

Backend = Literal["auto", "torch", "reference", "cpp", "triton", "megablocks"]
"""``auto`` is Triton on a GPU if its kernels pass their self-check, C++ on a CPU if those kernels
were built and pass theirs, and torch otherwise (docs/backends.md)."""


def _nothing(_: torch.device | ExpertCall) -> None:
    """Accept every device and every call."""


def _always(_: ExpertCall) -> bool:
    return True


def _never(_: ExpertCall) -> bool:
    return False


TORCH = ExpertBackend("torch", _nothing, _nothing, torch_experts.run, _always)
REFERENCE = ExpertBackend("reference", _nothing, _nothing, reference.run, _never)
CPP = ExpertBackend("cpp", why_not_cpp, cpp.misfit, cpp.run, trusts_cpp, devices=("cpu",))
TRITON = ExpertBackend(
    "triton",
    gpu.why_not,
    triton.misfit,
    triton.run,
    trusts_triton,
    devices=("cuda",),
    bits=(8, 4),
)
MEGABLOCKS = ExpertBackend(
    "megablocks",
    megablocks.why_not,
    megablocks.misfit,
    megablocks.run,
    _never,
    devices=("cuda",),
    dtypes=(torch.bfloat16,),
)

BACKENDS = {b.name: b for b in (TORCH, REFERENCE, CPP, TRITON, MEGABLOCKS)}
AUTOMATIC = {"cpu": (CPP, TORCH), "cuda": (TRITON, TORCH)}
"""What ``auto`` tries for each device type, best first."""


def expert_mlp(
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    experts: SlotWeights,
    backend: Backend = "auto",
    *,
    recompute: bool = False,
    most_choices: int | None = None,
) -> Tensor:
    """Return ``y_t = sum_k weights[t, k] * MLP_{experts[t, k]}(x_t)``, ``[T, D]`` in x's dtype.

    ``experts_TK`` holds logical expert ids, -1 for no expert; ``weights_TK`` may be wider than x
    (fp32 with bf16), and the sum over k runs in that type. Differentiable in x, the weights, fc1,
    fc2 and their biases, unless the experts are quantized. ``recompute`` keeps x only and computes
    fc1 again in backward. That costs the work of fc1 and saves its R * H outputs (H rows of fc1);
    the gradients have the same bits. It has no effect on the reference, where autograd decides,
    and in a graph compiled for a CPU, which keeps everything. ``most_choices`` promises that at
    most so many of ``experts_TK`` are experts: rows that come from other ranks have experts there,
    too. Triton then keeps room for so many; the other backends do not need to know.

    Raises ``ValueError`` for shapes that do not fit, ids out of range, gradients of quantized
    experts, and a backend that cannot run here.
    """
    call = ExpertCall(x_TD, experts_TK, weights_TK, experts, recompute, most_choices)
    call.check()
    if backend != "reference":
        _check_gradients(call)
    return _chosen(call, backend).run(call)


def _chosen(call: ExpertCall, name: Backend) -> ExpertBackend:
    """Return the backend that computes a call; raise ``ValueError`` if ``name`` cannot."""
    device = call.x_TD.device
    if name == "auto":
        for backend in AUTOMATIC.get(device.type, (TORCH,)):
            if backend.misfit(call) is None and backend.is_trusted(call):
                return backend
    backend = TORCH if name == "auto" else BACKENDS[name]
    problem = backend.why_not(device) or backend.misfit(call)
    if problem is not None:
        raise ValueError(f"backend is {name!r}, but {problem} Use backend 'auto'.")
    return backend


def _check_gradients(call: ExpertCall) -> None:
    wants_grad = call.x_TD.requires_grad or call.weights_TK.requires_grad
    if isinstance(call.experts, ExpertWeights) or not wants_grad or not torch.is_grad_enabled():
        return
    is_quantized = isinstance(call.experts, FewBitsExpertWeights)
    raise ValueError(
        "x or the routing weights require gradients, but "
        f"{'quantized experts' if is_quantized else 'experts stored by channel'} have no backward; "
        "run under torch.no_grad() or with plain weights."
    )


def check_backends() -> Iterator[BackendCheck]:
    """Yield the check of each backend on its devices and types; under a second on a CPU."""
    here = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
    for device in here:
        for backend in BACKENDS.values():
            # A backend for no device of this machine is listed once, with the reason.
            is_at_home = any(name in here for name in backend.devices)
            if device in backend.devices or (not is_at_home and device == here[0]):
                yield from _checks_of(backend, device)


def _checks_of(backend: ExpertBackend, device: str) -> Iterator[BackendCheck]:
    if backend is CPP and cpp_library().is_wrong:
        yield BackendCheck(backend.name, device, "any", 0.0, problem=cpp_library().state)
        return
    reason = backend.why_not(torch.device(device))
    if reason is not None:
        yield BackendCheck(backend.name, device, "any", 0.0, unavailable=reason)
        return
    for dtype in backend.dtypes:
        yield check_backend(backend.name, backend.run, dtype, device)
        for bits in backend.bits:
            yield check_quantized(backend.name, backend.run, dtype, device, bits)
