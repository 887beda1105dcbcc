"""Compare an expert backend with the reference in fp64, on this machine.

T tokens, K choices, E experts, D model width, F expert width.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..torch_ops import reference
from ..values.activation import Activation, fc1_rows
from ..values.calls import ExpertCall
from ..values.expert_weights import ExpertWeights
from ..values.quantize import quantize_experts
from ..values.quantized_weights import Bits

Run = Callable[[ExpertCall], Tensor]
"""What is checked: it returns ``y_t = sum_k weights[t, k] * MLP_{experts[t, k]}(x_t)``."""

LIMITS = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Largest error that passes, over the largest value of the same tensor. Measured on a CPU with
AVX512-BF16, and with its libraries held to SSE4: at most 6e-7 in fp32 and 7e-3 in bf16; fp16 has
eight times bf16's precision, and only GPUs compute in it."""

T, K, E, D, F = 61, 2, 5, 48, 32
"""Sizes that are not powers of two where the kernels allow it, with an expert that is idle."""

MANY_TOKENS = 400
"""Enough for the Triton kernels' large tiles."""

QUANTIZED_TOKENS = (4, T, 656)
"""Rows that reach each Triton path for 8 and 4 bits: decoding tiles, larger tiles, dequantized."""
QUANTIZED_D, QUANTIZED_F = 128, 64
GROUP_SIZES: dict[Bits, tuple[int | None, ...]] = {8: (None, 64), 4: (64, 32)}
"""Group sizes: a scale per row, per step of a product, and per group shorter than a step."""


@dataclass(frozen=True, slots=True)
class BackendCheck:
    """The result of checking one backend in one type on one device."""

    backend: str
    device: str
    dtype: str
    limit: float
    errors: dict[str, float] = field(default_factory=dict)
    """Of the values and of each gradient, relative to the largest of the reference."""
    problem: str | None = None
    """The error it raised, or what is wrong with its results."""
    unavailable: str | None = None
    """Why it is not available on this machine, in one sentence."""

    @property
    def passed(self) -> bool:
        """Whether it ran and every error is within the limit."""
        return bool(self.errors) and all(e <= self.limit for e in self.errors.values())

    @property
    def failed(self) -> bool:
        """Whether it is available, but raises an error or computes wrong results."""
        return self.unavailable is None and not self.passed


def check_backend(
    name: str,
    run: Run,
    dtype: torch.dtype,
    device: str,
    num_tokens: int = T,
    has_bias: bool = False,
    activation: Activation = "swiglu",
) -> BackendCheck:
    """Run one backend forward and backward and compare; ``has_bias`` gives the experts biases."""
    d_hidden = fc1_rows(F, activation)
    inputs, experts_TK = _inputs(dtype, num_tokens, D, d_hidden, F)
    inputs += _biases(dtype, D, d_hidden) if has_bias else []
    exact = [x.double() for x in inputs]
    expected = _outcome(reference.run, exact, experts_TK, "cpu", activation)
    return _compared(
        name, dtype, device, expected, lambda: _outcome(run, inputs, experts_TK, device, activation)
    )


def check_quantized(
    name: str,
    run: Run,
    dtype: torch.dtype,
    device: str,
    bits: Bits,
    has_bias: bool = False,
    activation: Activation = "swiglu",
) -> BackendCheck:
    """Run one backend on weights in 8 or 4 bits and compare the values."""
    how = (bits, has_bias, activation)
    exact = _quantized_values(reference.run, dtype, torch.float64, "cpu", *how)
    expected = {"values": exact}
    return _compared(
        f"{name} int{bits}",
        dtype,
        device,
        expected,
        lambda: {"values": _quantized_values(run, dtype, dtype, device, *how)},
    )


def _quantized_values(
    run: Run,
    rounded: torch.dtype,
    dtype: torch.dtype,
    device: str,
    bits: Bits,
    has_bias: bool,
    activation: Activation,
) -> Tensor:
    """Return all results of rows that were ``rounded``, computed in ``dtype``."""
    results, d_hidden = [], fc1_rows(QUANTIZED_F, activation)
    for num_tokens, group_size in itertools.product(QUANTIZED_TOKENS, GROUP_SIZES[bits]):
        sizes = (QUANTIZED_D, d_hidden, QUANTIZED_F)
        inputs, experts_TK = _inputs(rounded, num_tokens, *sizes)
        x_TD, weights_TK, *parameters = inputs
        parameters += _biases(rounded, QUANTIZED_D, d_hidden) if has_bias else []
        # Quantized before it is sent: another device may round a value to the other side.
        plain = _experts(parameters, activation)
        experts = quantize_experts(plain, bits, group_size).to(device)
        rows = (x_TD.to(device, dtype), experts_TK.to(device), weights_TK.to(device))
        results.append(run(ExpertCall(*rows, experts)).flatten())
    return torch.cat(results)


def _compared(
    backend: str,
    dtype: torch.dtype,
    device: str,
    expected: dict[str, Tensor],
    run: Callable[[], dict[str, Tensor]],
) -> BackendCheck:
    name, limit = str(dtype).removeprefix("torch."), LIMITS[dtype]
    try:
        found = run()
    except Exception as error:  # any error becomes a line of the table
        problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return BackendCheck(backend, device, name, limit, problem=problem)
    errors = {}
    for part, wanted in expected.items():
        distance = (found[part].double().cpu() - wanted).abs().max()
        if not torch.isfinite(distance):
            return BackendCheck(backend, device, name, limit, problem=f"{part} is not finite")
        errors[part] = float(distance / wanted.abs().max())
    return BackendCheck(backend, device, name, limit, errors)


def _inputs(
    dtype: torch.dtype, num_tokens: int, d_model: int, d_hidden: int, d_expert: int
) -> tuple[list[Tensor], Tensor]:
    """Return x, routing weights (fp32, as routers give them), fc1 and fc2; and experts_TK."""
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(num_tokens, d_model, generator=generator).to(dtype)
    weights_TK = torch.rand(num_tokens, K, generator=generator)
    fc1_EHD = torch.randn(E, d_hidden, d_model, generator=generator) * d_model**-0.5
    fc2_EDF = torch.randn(E, d_model, d_expert, generator=generator) * d_expert**-0.5
    # Expert 3 is idle, and some tokens have one expert only.
    experts_TK = torch.randint(0, E - 1, (num_tokens, K), generator=generator)
    experts_TK[experts_TK == 3] = 4
    experts_TK[::7, 1] = -1
    return [x_TD, weights_TK, fc1_EHD.to(dtype), fc2_EDF.to(dtype)], experts_TK


def _biases(dtype: torch.dtype, d_model: int, d_hidden: int) -> list[Tensor]:
    """Return biases of fc1 and fc2, about as large as the values they are added to."""
    generator = torch.Generator().manual_seed(1)
    widths = (d_hidden, d_model)
    return [torch.randn(E, width, generator=generator).to(dtype) for width in widths]


def _experts(parameters: list[Tensor], activation: Activation) -> ExpertWeights:
    fc1_EHD, fc2_EDF, *biases = parameters
    bias1_EH, bias2_ED = biases or (None, None)
    return ExpertWeights(
        fc1_EHD, fc2_EDF, activation=activation, fc1_bias_SH=bias1_EH, fc2_bias_SD=bias2_ED
    )


def _outcome(
    run: Run, inputs: list[Tensor], experts_TK: Tensor, device: str, activation: Activation
) -> dict[str, Tensor]:
    """Return the values and the gradients of a fixed weighted sum of them."""
    x_TD, weights_TK, *parameters = leaves = [
        tensor.to(device).requires_grad_() for tensor in (t.detach().clone() for t in inputs)
    ]
    experts = _experts(parameters, activation)
    y_TD = run(ExpertCall(x_TD, experts_TK.to(device), weights_TK, experts))
    slope_TD = torch.linspace(-1, 1, y_TD.numel(), device=device).view_as(y_TD).to(y_TD.dtype)
    gradients = torch.autograd.grad((y_TD * slope_TD).sum(), leaves)
    names = ("grad x", "grad weights", "grad fc1", "grad fc2", "grad bias1", "grad bias2")
    return {"values": y_TD.detach(), **dict(zip(names, gradients, strict=False))}
