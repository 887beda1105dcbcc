"""Check that the C++ kernels compute on this machine what torch does.

T tokens, K choices, E experts, D model width, F expert width.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cpu.experts import CppWaves
from ..cpu.library import TYPES
from ..cpu.linear import linear
from ..cpu.norm import rms_norm
from ..cpu.router import route
from ..torch_ops import reference
from ..values.calls import ExpertCall
from ..values.channel_weights import ChannelExpertWeights
from ..values.choice import ChoiceRule
from ..values.expert_weights import ExpertWeights
from ..values.n_of_m import keep_mask, masked
from ..values.quantize import quantize_experts
from ..values.quantized_weights import SlotWeights
from ..values.sparsify import sparsify_experts
from ..values.two_of_four import PATTERN, pack_experts

LIMITS = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
"""Largest error that passes, over the largest value. Measured with every instruction set of an
AVX512-BF16 processor: at most 2e-7 in fp32 and 3e-3 in bf16."""
QUANTIZED_LIMIT = 1e-3
"""The same in fp32 for quantized experts, which round rows to 16 bits: measured at most 6e-5."""

T, K, E, D, WIDTH = 13, 2, 3, 50, 37
"""Sizes that are not multiples of any vector or block, so that tails are tested."""
QUANTIZED_D, QUANTIZED_WIDTH = 160, 96
"""The same for quantized experts, whose widths are multiples of 32."""
SPARSITY = 0.4
"""Rows of fc1 keep 3 of 5 groups, those of fc2 2 of 3."""


@torch.inference_mode(False)
@torch.no_grad()
def problem() -> str | None:
    """Return what is wrong, or None. Takes a few milliseconds."""
    for dtype in TYPES:
        for name, found, expected in _results(dtype):
            error = float((found.double() - expected).abs().max() / expected.abs().max())
            limit = max(LIMITS[dtype], QUANTIZED_LIMIT if "bits" in name else 0)
            if not error <= limit:
                kind = str(dtype).removeprefix("torch.")
                return f"computes {name} in {kind} wrong: relative error {error:.0e}"
    return None


def _results(dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield what was computed, the result, and the same by torch in fp64."""
    generator = torch.Generator("cpu").manual_seed(0)

    def random(*shape: int) -> Tensor:
        wide = {"dtype": torch.float32, "device": "cpu"}
        return torch.randn(shape, generator=generator, **wide)  # type: ignore[call-overload,no-any-return]

    x_TD = random(T, D).to(dtype)
    wide_TD = x_TD.double()
    weight_D = random(D).to(dtype)
    found = rms_norm(x_TD, weight_D, 1e-6)
    assert found is not None, "the kernels are there"
    yield "norms", found, F.rms_norm(wide_TD, (D,), weight_D.double(), 1e-6)

    fc1_EHD = (random(E, 2 * WIDTH, D) * D**-0.5).to(dtype)
    fc2_EDF = (random(E, D, WIDTH) * WIDTH**-0.5).to(dtype)
    found = linear(x_TD, fc1_EHD[0])
    assert found is not None, "the kernels are there"
    yield "products", found, F.linear(wide_TD, fc1_EHD[0].double())

    gate_ED = random(E, D)
    rule = ChoiceRule(k=K, renormalize=False)
    routed = route(x_TD, gate_ED, None, None, rule)
    assert routed is not None, "the kernels are there"
    experts_TK, weights_TK = routed.experts_TK, routed.weights_TK
    scores_TE = F.linear(wide_TD, gate_ED.double()).softmax(dim=-1)
    yield "routing", weights_TK, scores_TE.topk(K).values

    biases = [random(E, width).to(dtype) for width in (2 * WIDTH, D)]
    waves = CppWaves(x_TD, experts_TK, weights_TK)
    waves.add(ExpertWeights(fc1_EHD, fc2_EDF, fc1_bias_SH=biases[0], fc2_bias_SD=biases[1]))
    wide = ExpertWeights(
        fc1_EHD.double(),
        fc2_EDF.double(),
        fc1_bias_SH=biases[0].double(),
        fc2_bias_SD=biases[1].double(),
    )
    expected_TD = reference.run(ExpertCall(wide_TD, experts_TK, weights_TK.double(), wide))
    yield "experts", waves.result(), expected_TD
    yield _without_gate((x_TD, experts_TK, weights_TK), (fc1_EHD[:, :WIDTH].contiguous(), fc2_EDF))
    for stored in _by_channel(fc1_EHD, fc2_EDF, biases):
        waves = CppWaves(x_TD, experts_TK, weights_TK)
        waves.add(stored)
        yield "experts by channel", waves.result(), expected_TD

    x_TD = random(T, QUANTIZED_D).to(dtype)
    fc1_EHD = random(E, 2 * QUANTIZED_WIDTH, QUANTIZED_D) * QUANTIZED_D**-0.5
    fc2_EDF = random(E, QUANTIZED_D, QUANTIZED_WIDTH) * QUANTIZED_WIDTH**-0.5
    rows = (x_TD.double(), experts_TK, weights_TK.double())
    plain = ExpertWeights(fc1_EHD, fc2_EDF)
    for name, narrow in _in_fewer_bytes(plain).items():
        waves = CppWaves(x_TD, experts_TK, weights_TK)
        waves.add(narrow)
        yield name, waves.result(), reference.run(ExpertCall(*rows, narrow))


def _in_fewer_bytes(plain: ExpertWeights) -> dict[str, SlotWeights]:
    """Return experts in every form that is smaller, by name."""
    half = (masked(w, keep_mask(w, PATTERN)) for w in (plain.fc1_SHD, plain.fc2_SDF))
    return {
        "experts of 8 bits": quantize_experts(plain, 8, 32),
        "experts of 4 bits": quantize_experts(plain, 4, 32),
        "group-sparse experts of 4 bits": sparsify_experts(plain, SPARSITY),
        "2:4 experts": pack_experts(ExpertWeights(*half)),
    }


def _without_gate(
    rows: tuple[Tensor, Tensor, Tensor], matrices: tuple[Tensor, Tensor]
) -> tuple[str, Tensor, Tensor]:
    """Return the part of :func:`_results` on experts whose activation has no gate."""
    waves = CppWaves(*rows)
    waves.add(ExpertWeights(*matrices, activation="gelu"))
    wide = ExpertWeights(*(part.double() for part in matrices), activation="gelu")
    x_TD, experts_TK, weights_TK = rows
    call = ExpertCall(x_TD.double(), experts_TK, weights_TK.double(), wide)
    return "experts without a gate", waves.result(), reference.run(call)


def _by_channel(
    fc1_EHD: Tensor, fc2_EDF: Tensor, biases: list[Tensor]
) -> Iterator[ChannelExpertWeights]:
    """Yield the same experts by channel, in both layouts."""
    for by_input in (False, True):
        matrices = (fc1_EHD.mT.contiguous() if by_input else fc1_EHD, fc2_EDF.mT.contiguous())
        yield ChannelExpertWeights(
            *matrices, by_input=by_input, fc1_bias_SH=biases[0], fc2_bias_SD=biases[1]
        )
