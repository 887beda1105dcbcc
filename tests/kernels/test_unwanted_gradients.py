"""Frozen parameters of the expert MLP: no gradient for them, and the same bits for all others."""

import pytest
import torch

from moeyard.kernels.cpu import library
from moeyard.kernels.experts import expert_mlp
from moeyard.kernels.values.expert_weights import ExpertWeights
from moeyard.kernels.values.main_grads import MainGrads

T, K, E, D, F = 61, 2, 5, 24, 40
NAMES = ("x", "weights", "fc1", "fc2", "fc1_bias", "fc2_bias")
BACKENDS = [
    "reference",
    "torch",
    pytest.param(
        "cpp",
        marks=pytest.mark.skipif(library.load().functions is None, reason="no C++ kernels here"),
    ),
]
FROZEN = [("fc1", "fc2", "fc1_bias", "fc2_bias"), ("fc1", "fc2"), ("fc1", "fc1_bias"), ("fc2",)]


def problem(dtype):
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(-1, E - 1, (T, K), generator=g)
    sizes = ((T, D), (T, K), (E, 2 * F, D), (E, D, F), (E, 2 * F), (E, D))
    leaves = [torch.randn(size, generator=g) / size[-1] ** 0.5 for size in sizes]
    return ids, [leaf.to(dtype) for leaf in leaves]


def gradients(ids, leaves, backend, frozen, run=expert_mlp):
    leaves = [
        leaf.clone().requires_grad_(name not in frozen)
        for name, leaf in zip(NAMES, leaves, strict=True)
    ]
    x, weights, fc1, fc2, *biases = leaves
    experts = ExpertWeights.of((fc1, fc2, *biases))
    run(x, ids, weights, experts, backend).square().sum().backward()
    return {name: leaf.grad for name, leaf in zip(NAMES, leaves, strict=True)}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_frozen_parameters_have_no_gradient_and_the_others_the_same_bits(backend, dtype):
    ids, leaves = problem(dtype)
    every = gradients(ids, leaves, backend, ())
    for frozen in FROZEN:
        some = gradients(ids, leaves, backend, frozen)
        for name in NAMES:
            if name in frozen:
                assert some[name] is None
            else:
                assert torch.equal(some[name], every[name]), (frozen, name)


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("frozen", FROZEN, ids="-".join)
def test_no_backward_computes_what_is_not_wanted(backend, frozen, monkeypatch):
    """From outside, a gradient that autograd throws away would look the same."""
    asked, make = [], MainGrads.empty_for
    monkeypatch.setattr(MainGrads, "empty_for", lambda *a: asked.append(make(*a)) or asked[-1])
    gradients(*problem(torch.float32), backend, frozen)
    (sums,) = asked
    for name, total in zip(NAMES[2:], sums.totals, strict=True):
        assert (total is None) == (name in frozen)


def test_a_compiled_graph_leaves_them_out_too():
    if library.load().functions is None:
        pytest.skip(library.load().state)
    torch._dynamo.reset()
    ids, leaves = problem(torch.bfloat16)
    compiled = torch.compile(expert_mlp, backend="aot_eager", fullgraph=True)
    eager = gradients(ids, leaves, "auto", FROZEN[1])
    found = gradients(ids, leaves, "auto", FROZEN[1], compiled)
    for name in NAMES:
        assert (found[name] is None) == (name in FROZEN[1])
        assert found[name] is None or torch.equal(found[name], eager[name])


@pytest.mark.skipif(library.load().functions is None, reason="no C++ kernels here")
def test_bf16_gradients_of_many_rows_are_sums_in_fp32_rounded_once():
    """One expert has more rows than a panel is deep, so its sums wait for the next depth."""
    g = torch.Generator().manual_seed(1)
    tokens, d_model, d_expert = 1200, 16, 72
    x = torch.randn(tokens, d_model, generator=g).bfloat16()
    fc1 = (torch.randn(2, 2 * d_expert, d_model, generator=g) / 4).bfloat16()
    fc2 = (torch.randn(2, d_model, d_expert, generator=g) / 8).bfloat16()
    ids = (torch.arange(tokens) >= 1100).long().unsqueeze(1)
    upstream = torch.randn(tokens, d_model, generator=g).bfloat16()
    found = []
    for sums in (None, [torch.empty(w.shape) for w in (fc1, fc2)]):
        leaves = [fc1.clone().requires_grad_(), fc2.clone().requires_grad_()]
        main = None if sums is None else MainGrads(*sums, is_empty=True)
        experts = ExpertWeights(*leaves, main_grads=main)
        expert_mlp(x, ids, torch.ones(tokens, 1), experts, "cpp").backward(upstream)
        found.append([leaf.grad for leaf in leaves] if sums is None else sums)
    for rounded, wide in zip(*found, strict=True):
        assert torch.equal(rounded, wide.bfloat16())
