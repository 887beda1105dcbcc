"""The C++ attention of single new positions against its formula in fp64."""

import pytest
import torch
from attention_cases import CASES, LAYER, PAST, caches_of, expected_step, inputs, layer
from torch import Tensor, nn

from moeyard.kernels.cpu import library
from moeyard.kernels.cpu.attention import (
    AttentionModules,
    AttentionOptions,
    RowAttention,
)
from moeyard.kernels.cpu.cached_rows import NewRows

pytestmark = [
    pytest.mark.skipif(library.load().functions is None, reason=library.load().state),
    pytest.mark.usefixtures("no_gradients"),
]
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2e-2}
"""Largest error that passes, over the largest value; 4.4e-7 and 1.1e-2 were measured."""
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)


def steps(modules, options, dtype, past, count=2) -> list[tuple[Tensor, Tensor]]:
    """Return what the kernels give for ``count`` positions of each sequence, one by one."""
    attention, (caches, _) = RowAttention(modules, options), caches_of(dtype, past)
    found = []
    for step in range(count):
        x_BD, *rope = inputs(dtype, past, step)
        made = attention.run(x_BD, tuple(rope), LAYER, NewRows(caches, [1] * len(caches)))
        assert made is not None
        found.append(made)
        for cache in caches:
            cache.length += 1
    return found


def error_of(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


@DTYPES
@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("instruction_set")
def test_two_positions_agree_with_the_formula(name, dtype):
    modules, options = layer(CASES[name], dtype)
    _, known = caches_of(dtype, PAST)
    for step, found in enumerate(steps(modules, options, dtype, PAST)):
        expected = expected_step(modules, options, inputs(dtype, PAST, step), known)
        for part, wanted in zip(found, expected, strict=True):
            assert part.dtype == dtype
            assert error_of(part, wanted) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", [name for name in CASES if name != "plain"])
def test_no_case_could_pass_without_what_it_is_about(name):
    modules, options = layer(CASES[name], torch.float64)
    plain_modules, plain = layer(CASES["plain"], torch.float64)
    for linear in "qkvo":  # the same weights, independent of other draws
        getattr(plain_modules, linear).weight = getattr(modules, linear).weight
    for norm in ("input_norm", "output_norm"):
        getattr(plain_modules, norm).weight = getattr(modules, norm).weight
    found = []
    for some_modules, numbers in ((modules, options), (plain_modules, plain)):
        _, known = caches_of(torch.float64, PAST)
        arguments = inputs(torch.float64, PAST, 0)
        found.append(expected_step(some_modules, numbers, arguments, known)[0])
    assert error_of(*found) > 3 * max(TOLERANCE.values())


@DTYPES
@pytest.mark.parametrize("name", ["plain", "gpt_oss", "olmoe", "all"])
@pytest.mark.usefixtures("instruction_set")
def test_a_sequences_bits_depend_on_no_other_and_on_no_number_of_threads(name, dtype):
    modules, options = layer(CASES[name], dtype)
    past = (70, 3, 0, 41, 13, 5, 22, 1, 60) * 8  # enough work for more than one thread
    torch.set_num_threads(3)
    together = steps(modules, options, dtype, past)
    torch.set_num_threads(1)
    for b in (0, 2, 8):
        alone = steps(modules, options, dtype, past[b : b + 1])
        for found, expected in zip(together, alone, strict=True):
            for part, wanted in zip(found, expected, strict=True):
                assert torch.equal(part[b : b + 1], wanted)


PLACES = [
    *("input_norm.weight", "output_norm.weight", "q_norm.weight", "k_norm.weight"),
    *(f"{linear}.{name}" for linear in "qkvo" for name in ("weight", "bias")),
    "attention.sinks",
]


@pytest.mark.parametrize("place", PLACES)
def test_sees_that_a_parameter_or_its_module_is_another(place):
    modules, options = layer(CASES["all"], torch.float32)
    attention = RowAttention(modules, options)
    module, name = place.split(".")
    old = getattr(getattr(modules, module), name)
    old.add_(1.0)
    assert attention.is_of(modules), "parameters at the same addresses need no update"
    other = nn.Module()
    setattr(other, name, old)
    assert not attention.is_of(modules._replace(**{module: other}))
    setattr(getattr(modules, module), name, nn.Parameter(old.clone()))
    assert not attention.is_of(modules)
    setattr(getattr(modules, module), name, None)
    assert not attention.is_of(modules)


@pytest.mark.parametrize("missing", ["q_norm", "k_norm"])
def test_leaves_a_layer_with_one_norm_to_others(missing):
    modules, options = layer(CASES["norm_of_heads"], torch.float32)
    assert attempt(modules._replace(**{missing: None}), options) is None
    assert attempt(modules, options) is not None


@pytest.mark.parametrize("place", PLACES)
def test_leaves_parameters_of_several_types_to_others(place):
    modules, options = layer(CASES["all"], torch.float32)
    module, name = place.split(".")
    parameter = getattr(getattr(modules, module), name)
    parameter.data = parameter.data.bfloat16()
    assert attempt(modules, options) is None


def test_leaves_rows_that_need_gradients_to_others():
    modules, options = layer(CASES["all"], torch.float32)
    with torch.enable_grad():
        assert attempt(modules, options) is None


def attempt(modules: AttentionModules, options: AttentionOptions) -> tuple[Tensor, Tensor] | None:
    caches, _ = caches_of(torch.float32, PAST)
    x_BD, *rope = inputs(torch.float32, PAST, 0)
    return RowAttention(modules, options).run(
        x_BD, tuple(rope), LAYER, NewRows(caches, [1] * len(caches))
    )
