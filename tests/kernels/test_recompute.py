"""fc1 computed again in backward, on torch and C++: the same gradients, and less memory kept."""

import pytest
import torch

import moeyard
from moeyard.errors import ConfigError
from moeyard.kernels.cpu import library
from moeyard.kernels.experts import expert_mlp
from moeyard.kernels.values.expert_weights import ExpertWeights
from moeyard.kernels.values.main_grads import MainGrads
from moeyard.moe.config.model import ModelConfig
from moeyard.moe.models.decoder import Decoder
from moeyard.training.read_config import read_run_config

T, K, E, D, F = 61, 2, 5, 24, 40
BACKENDS = [
    "torch",
    pytest.param(
        "cpp",
        marks=pytest.mark.skipif(library.load().functions is None, reason="no C++ kernels here"),
    ),
]


def problem(dtype):
    g = torch.Generator().manual_seed(0)
    x, weights = torch.randn(T, D, generator=g), torch.rand(T, K, generator=g)
    fc1 = torch.randn(E, 2 * F, D, generator=g) * D**-0.5
    fc2 = torch.randn(E, D, F, generator=g) * F**-0.5
    ids = torch.randint(-1, E - 1, (T, K), generator=g)
    biases = torch.randn(E, 2 * F, generator=g), torch.randn(E, D, generator=g)
    return ids, [leaf.to(dtype).requires_grad_() for leaf in (x, weights, fc1, fc2, *biases)]


def outcome(ids, leaves, backend, recompute, main_grads=None):
    """Return y, the gradients, and the bytes kept in addition to the leaves."""
    x, weights, fc1, fc2, *biases = leaves
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.__setitem__(t.data_ptr(), t.nbytes) or t, lambda t: t
    ):
        experts = ExpertWeights.of((fc1, fc2, *biases), main_grads=main_grads)
        y = expert_mlp(x, ids, weights, experts, backend, recompute=recompute)
    wanted = leaves if main_grads is None else leaves[:2]
    grads = torch.autograd.grad(y, wanted, torch.cos(torch.arange(y.numel())).view_as(y).to(y))
    return (y.detach(), *grads), sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_bit_equal_and_less_is_kept(backend, dtype):
    ids, leaves = problem(dtype)
    plain, plain_bytes = outcome(ids, leaves, backend, False)
    again, again_bytes = outcome(ids, leaves, backend, True)
    assert all(torch.equal(a, b) for a, b in zip(again, plain, strict=True))
    # Torch's path keeps only rows of experts that are here, and some padding.
    rows = T * K if backend == "cpp" else int((ids >= 0).sum())
    assert plain_bytes - again_bytes >= rows * 2 * F * dtype.itemsize


@pytest.mark.parametrize("backend", BACKENDS)
def test_main_gradients_are_bit_equal(backend):
    ids, leaves = problem(torch.bfloat16)
    totals = []
    for recompute in (False, True):
        ones = [torch.ones(leaf.shape) for leaf in leaves[2:]]
        sums = MainGrads.of(ones)
        grads, _ = outcome(ids, leaves, backend, recompute, sums)
        totals.append((*grads, *ones))
    assert all(torch.equal(a, b) for a, b in zip(*totals, strict=True))


def test_a_run_asks_for_it_with_train_recompute(config_file):
    def asked(value):
        overrides = [f"train.recompute={value}", "run_dir=unused"]
        return read_run_config(config_file, overrides).train.recompute

    assert [asked("true"), asked("false"), asked("experts")] == [True, False, "experts"]
    with pytest.raises(ConfigError, match=r"train\.recompute: .* True, False or .experts"):
        asked("sometimes")
    config = read_run_config(config_file, ["run_dir=unused", "model.vocab_size=50"]).model
    assert isinstance(config, ModelConfig)
    for value in (True, False, "experts"):
        decoder = Decoder(config, recompute=value)
        assert decoder.recompute is (value is True)
        for _, layer in decoder.moe_layers():
            assert layer.experts.recompute is (value == "experts")


def test_a_layer_that_recomputes_keeps_less_and_has_the_same_gradients():
    found, kept_bytes = [], []
    for recompute in (False, True):
        torch.manual_seed(0)
        layer = moeyard.MoELayer(D, F, E, moeyard.TopK(k=K), recompute=recompute)
        x, kept = torch.randn(1, T, D), {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: kept.__setitem__(t.data_ptr(), t.nbytes) or t, lambda t: t
        ):
            y, _ = layer(x)
        found.append(torch.autograd.grad(y.square().sum(), list(layer.parameters())))
        kept_bytes.append(sum(kept.values()))
    assert kept_bytes[0] - kept_bytes[1] == T * K * 2 * F * 4
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
