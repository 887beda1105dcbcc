"""Every shipped configuration of the Triton kernels compiles for A100 and H100 and fits them.

Needs no GPU: Triton brings the compiler, and the assembler's report says what came out.
"""

import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has no package for this system")
sys.path.insert(0, str(Path(__file__).parent.parent.parent / "benchmarks"))

from triton_registers import TYPES, cases, compile_case

SAMPLE = {
    "up_projection  bf16 swiglu, keeps h",
    "up_projection  bf16 clamped_swiglu, keeps h, biased",
    "grouped_matmul bf16 fc2",
    "grouped_matmul bf16 fc2, biased",
    "bias_grad      bf16 fc2, adds to fp32",
    "grad_hidden    bf16 swiglu",
    "up_projection  bf16 gelu, keeps h",
    "weight_grad    bf16 fc2, adds to fp32",
    "quantized_up   bf16 swiglu, int8, a scale per row",
    "quantized_up   bf16 swiglu, int4, groups of 64",
    "quantized_up   bf16 clamped_swiglu, int4, groups of 32, biased",
    "quantized_matmul bf16 int4, groups of 64",
    "route          fp32 990 experts in 33 groups, sigmoid",
    "route          fp32 256 experts in 8 groups, sigmoid",
    "route_grad     fp32 128 experts, sigmoid",
}
"""The large tiles of bf16 and of the router, which are nearest to the limits."""


def is_in_sample(case):
    name = f"{case.kernel.fn.__name__.removesuffix('_kernel'):14} {TYPES[case.dtype]} {case.label}"
    largest = 64 if "quantized" in name else 128
    return name in SAMPLE and (case.tiles is None or largest == case.tiles.M)


def check(chosen):
    assert chosen
    found = [compile_case(case) for case in chosen]
    print("", *(compiled.line for compiled in found), sep="\n")
    problems = [f"{made.case.name}: {', '.join(made.problems)}" for made in found if made.problems]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("arch", [80, 90])
def test_the_largest_tiles_spill_nothing_fit_shared_memory_and_use_tensor_cores(arch):
    chosen = [case for case in cases(arch) if is_in_sample(case)]
    assert len(chosen) == len(SAMPLE)
    check(chosen)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
def test_every_configuration_spills_nothing_fits_and_uses_tensor_cores(arch):
    check(list(cases(arch)))
