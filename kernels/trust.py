"""Which kernels may be used here: each passes a check against torch or the reference first.

Compilers have silently miscompiled such kernels on some machines. A check runs once per process:
for the C++ kernels as a whole, and for Triton's by kind of call. Its result is kept here.
"""

import functools
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from .checks import cpu as cpu_check
from .checks import experts as experts_check
from .checks import router as router_check
from .cpu import library
from .cpu.library import Library
from .gpu import choice as triton_choice
from .gpu import device as triton
from .gpu import experts as triton_experts
from .values.activation import UNGATED, Activation
from .values.calls import ExpertCall
from .values.quantized_weights import Bits, QuantizedExpertWeights

Result = TypeVar("Result")
Kind = tuple[torch.dtype, torch.device, Bits | None, bool, bool]
"""Type of the rows, device, bits of the weights (None = not quantized), whether with biases, and
whether with a gate."""

_checking = threading.Lock()
_cpp_verdict: tuple[Library, Library] | None = None
"""The library that was checked, and the result."""
_triton_verdicts: dict[Kind, bool] = {}
_router_verdicts: dict[torch.device, bool] = {}


def cpp() -> Library:
    """Return the C++ kernels if they pass their check, else why they are not used."""
    global _cpp_verdict
    loaded, known = library.load(), _cpp_verdict
    if known is not None and known[0] is loaded:
        return known[1]
    with _checking:
        if _cpp_verdict is None or _cpp_verdict[0] is not loaded:
            _cpp_verdict = loaded, _checked(loaded)
        return _cpp_verdict[1]


def may_use_cpp(x: torch.Tensor) -> bool:
    """Say whether the C++ kernels may be asked to take ``x``: they exist and pass their check.

    Tensors that they never take are refused first, so that those build and load nothing.
    """
    if not x.is_cpu or x.dtype not in library.TYPES:
        return False
    if torch.compiler.is_compiling():
        return _has_cpp_in_graphs()
    return cpp().functions is not None


def _has_cpp_in_graphs() -> bool:
    return cpp().functions is not None


# What torch.compiler.assume_constant_result does. Called here it would import torch._dynamo, which
# takes 1.3 s of every start, compiled graphs or not.
_has_cpp_in_graphs._dynamo_marked_constant = True  # type: ignore[attr-defined]


def trusts_cpp(call: ExpertCall) -> bool:
    """Say whether ``auto`` may choose the C++ kernels, which are checked as a whole."""
    return may_use_cpp(call.x_TD)


def why_not_cpp(device: torch.device) -> str | None:
    """Say in one sentence why the C++ kernels cannot run on ``device``, or None where they can."""
    if torch.compiler.is_compiling():
        return None if _has_cpp_in_graphs() else "There are no C++ kernels here."
    state = cpp()
    return None if state.functions is not None else f"{state.state}."


def _checked(loaded: Library) -> Library:
    if loaded.functions is None:
        return loaded
    try:
        found = cpu_check.problem()
    except Exception as error:  # any error: unchecked kernels do not run
        found = f"could not be checked ({type(error).__name__}: {error})"
    if found is None:
        return loaded
    return library.without(f"{loaded.state} {found}")._replace(is_wrong=True)


def trusts_triton(call: ExpertCall) -> bool:
    """Say whether ``auto`` may choose Triton for a call.

    The first call of a kind checks the kernels, which compiles them and waits for the device.
    During torch.compile tracing and CUDA graph capture nothing can be checked, and only earlier
    results count.
    """
    experts, device = call.experts, call.x_TD.device
    bits_here: set[Bits | None] = {None}
    if isinstance(experts, QuantizedExpertWeights):
        bits_here = {experts.fc1.bits, experts.fc2.bits}
    has_bias = bool(experts.bias_parts)
    has_gate = experts.activation not in UNGATED
    kinds = [(call.x_TD.dtype, device, bits, has_bias, has_gate) for bits in bits_here]
    if _cannot_check(call.x_TD):
        return all(_triton_verdicts.get(kind, False) for kind in kinds)
    return triton.why_not(device) is None and all(triton_computes(*kind) for kind in kinds)


def triton_computes(
    dtype: torch.dtype,
    device: torch.device,
    bits: Bits | None,
    has_bias: bool,
    has_gate: bool = True,
) -> bool:
    """Check Triton's expert kernels of a kind once; warn if they fail."""
    kind = (dtype, device, bits, has_bias, has_gate)
    if kind not in _triton_verdicts:
        _triton_verdicts[kind] = _passes(*kind)
    return _triton_verdicts[kind]


def _passes(
    dtype: torch.dtype, device: torch.device, bits: Bits | None, has_bias: bool, has_gate: bool
) -> bool:
    activation: Activation = "swiglu" if has_gate else "gelu"
    check = functools.partial(
        experts_check.check_quantized if bits is not None else experts_check.check_backend,
        "triton",
        triton_experts.run,
        dtype,
        str(device),
    )
    if bits is None:
        sizes = (experts_check.T, experts_check.MANY_TOKENS)
        checks = [functools.partial(check, n, has_bias, activation) for n in sizes]
    else:
        checks = [functools.partial(check, bits, has_bias, activation)]
    for run in checks:
        outcome = _apart(run)
        if not outcome.passed:
            worst = max(outcome.errors.values(), default=float("nan"))
            limit = outcome.limit
            reason = outcome.problem or f"the largest error is {worst:.0e}, the limit {limit}"
            kernels = "expert kernels" if bits is None else f"kernels for {bits}-bit experts"
            warnings.warn(
                f"Triton's {kernels} do not pass their self-check for {outcome.dtype} on "
                f"{device} ({reason}); using the torch backend. `moeyard doctor` says more.",
                stacklevel=4,
            )
            return False
    return True


def _cannot_check(x: torch.Tensor) -> bool:
    """Say whether kernels for x's device cannot be checked now."""
    if torch.compiler.is_compiling():
        return True
    with triton.on_device_of(x):  # asked elsewhere, CUDA would open a context on its first device
        return torch.cuda.is_current_stream_capturing()


def _apart(check: Callable[[], Result]) -> Result:
    """Return the result of a check, which runs in another thread.

    The first call of a kind may come in the middle of anything: inside a checkpointed layer, whose
    hooks would take the check's own tensors for those of the layer, and compute the layer again
    in the check's backward; under autocast; in inference mode. A new thread has none of these.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="moeyard-check") as pool:
        return pool.submit(check).result()


def trusts_triton_router(logits_TE: torch.Tensor) -> bool:
    """Say whether ``auto`` may choose Triton's router; see :func:`trusts_triton`."""
    if not logits_TE.is_cuda or triton_choice.misfit(logits_TE) is not None:
        return False
    device = logits_TE.device
    if _cannot_check(logits_TE):
        return _router_verdicts.get(device, False)
    return triton.why_not(device) is None and triton_router_computes(device)


def triton_router_computes(device: torch.device) -> bool:
    """Check Triton's router against torch's once per device; warn if it fails."""
    if device not in _router_verdicts:
        problem = _apart(lambda: router_check.problem_with(triton_choice.choose_triton, device))
        _router_verdicts[device] = problem is None
        if problem is not None:
            warnings.warn(
                f"Triton's router does not pass its self-check on {device} ({problem}); using "
                "torch's operators.",
                stacklevel=4,
            )
    return _router_verdicts[device]


def router_state() -> str:
    """Return a line for `moeyard doctor` on Triton's router on this machine's GPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reason = triton.why_not(device)
    if reason is not None:
        return f"not available: {reason}"
    problem = router_check.problem_with(triton_choice.choose_triton, device)
    return "passes its self-check" if problem is None else f"FAILED its self-check: {problem}"
