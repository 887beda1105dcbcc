"""When the Triton backend is chosen, and its messages when it cannot be; without a GPU."""

import importlib.util
import random
import warnings

import pytest
import torch

from moeyard.kernels import trust
from moeyard.kernels.checks import experts as self_check
from moeyard.kernels.checks.experts import BackendCheck
from moeyard.kernels.cpu import library
from moeyard.kernels.experts import expert_mlp
from moeyard.kernels.gpu import experts as triton_experts
from moeyard.kernels.gpu.device import why_not
from moeyard.kernels.gpu.tiles import tile_rows
from moeyard.kernels.values.calls import ExpertCall
from moeyard.kernels.values.expert_weights import ExpertWeights, empty_slots
from moeyard.kernels.values.main_grads import MainGrads
from moeyard.kernels.values.quantize import quantize_experts
from moeyard.kernels.values.quantized_weights import QuantizedExpertWeights, QuantizedMatrices

from backends import pretend_there


def problem(dtype=torch.float32):
    x, fc1, fc2 = torch.randn(4, 8), torch.randn(3, 12, 8), torch.randn(3, 8, 6)
    weights, ids = torch.rand(4, 2), torch.randint(0, 3, (4, 2))
    return x.to(dtype), ids, weights, ExpertWeights(fc1.to(dtype), fc2.to(dtype))


def test_a_cpu_takes_cpp_or_torch_by_itself_and_refuses_triton_in_a_sentence(monkeypatch):
    arguments = problem()
    expected = expert_mlp(*arguments, "torch")
    if library.load().functions is not None:
        torch.testing.assert_close(expert_mlp(*arguments), expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(expert_mlp(*arguments), expert_mlp(*arguments, "cpp"))
    monkeypatch.setattr(library, "_loaded", library.Library(None, "no C++ compiler"))
    assert torch.equal(expert_mlp(*arguments), expected)
    with pytest.raises(
        ValueError, match=r"backend is 'cpp', .* no C\+\+ compiler.*Use backend 'auto'\."
    ):
        expert_mlp(*arguments, "cpp")
    with pytest.raises(ValueError, match=r"needs a CUDA device\. Use backend 'auto'\."):
        expert_mlp(*arguments, "triton")


def test_says_that_triton_is_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "not installed" in why_not(torch.device("cuda"))
    with pytest.raises(ValueError, match="not installed"):
        expert_mlp(*problem(), "triton")


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (9, 0)])
def test_wants_ampere_or_newer(monkeypatch, capability):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    reason = why_not(torch.device("cuda"))
    assert (reason is None) == (capability >= (8, 0))
    assert reason is None or "this GPU has 7.5" in reason


@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("broken", ["wrong numbers", "an exception", None])
def test_a_failing_self_check_warns_once_and_is_remembered(monkeypatch, broken, has_bias):
    sizes = []

    def check(backend, run, dtype, device, num_tokens, checks_bias, activation):
        assert (checks_bias, activation) == (has_bias, "gelu" if has_bias else "swiglu")
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        sizes.append(num_tokens)
        errors = {"values": 0.5 if broken == "wrong numbers" else 0.0}
        problem = "RuntimeError: no image" if broken == "an exception" else None
        return BackendCheck(backend, device, "bfloat16", 0.03, {} if problem else errors, problem)

    monkeypatch.setattr(self_check, "check_backend", check)
    monkeypatch.setattr(trust, "_triton_verdicts", {})
    with warnings.catch_warnings(record=True) as said, torch.inference_mode():
        warnings.simplefilter("always")
        kind = (torch.bfloat16, torch.device("cuda"), None, has_bias, not has_bias)
        found = {trust.triton_computes(*kind) for _ in "ab"}
    assert found == {broken is None}
    assert len(said) == (broken is not None)
    assert broken is None or "using the torch backend" in str(said[0].message)
    assert sizes == ([self_check.T, self_check.MANY_TOKENS] if broken is None else [self_check.T])


def test_says_what_it_does_not_take(monkeypatch):
    pretend_there(monkeypatch, "triton")
    x, ids, weights, experts = problem()
    with pytest.raises(ValueError, match=r"take bf16, fp16 and fp32, not torch\.float64"):
        expert_mlp(*problem(torch.float64), "triton")
    with pytest.raises(ValueError, match=r"experts have type torch\.uint8"):
        expert_mlp(x, ids.byte(), weights, experts, "triton")
    by_column = ExpertWeights(experts.fc1_SHD, experts.fc2_SDF.mT.contiguous().mT)
    with pytest.raises(ValueError, match=r"fc2 has strides \(48, 1, 8\)"):
        expert_mlp(x, ids, weights, by_column, "triton")
    elsewhere = problem()[3].fc2_SDF.to("meta")
    with pytest.raises(ValueError, match="on cpu, meta; they must share one device"):
        expert_mlp(x, ids, weights, ExpertWeights(experts.fc1_SHD, elsewhere), "triton")
    biases = {"fc1_bias_SH": torch.zeros(3, 24)[:, ::2], "fc2_bias_SD": torch.zeros(3, 8)}
    with pytest.raises(ValueError, match=r"A bias has strides \(24, 2\) and type torch\.float32"):
        spread = ExpertWeights(experts.fc1_SHD, experts.fc2_SDF, **biases)
        expert_mlp(x, ids, weights, spread, "triton")
    sums = MainGrads(torch.zeros(3, 8, 12).mT, torch.zeros(3, 8, 6))
    with pytest.raises(ValueError, match="main gradients are not contiguous"):
        with_sums = ExpertWeights(experts.fc1_SHD, experts.fc2_SDF, main_grads=sums)
        expert_mlp(x, ids, weights, with_sums, "triton")


def test_says_what_it_does_not_take_of_quantized_experts(monkeypatch):
    pretend_there(monkeypatch, "triton")
    x, ids, weights = torch.randn(4, 64), torch.randint(0, 3, (4, 2)), torch.rand(4, 2)
    plain = ExpertWeights(torch.randn(3, 64, 64), torch.randn(3, 64, 32))
    experts = quantize_experts(plain, 8)
    assert triton_experts.misfit(ExpertCall(x, ids, weights, experts)) is None
    values = experts.fc2.values.mT.contiguous().mT
    by_column = QuantizedMatrices(values, experts.fc2.scales_SQG)
    with pytest.raises(ValueError, match=r"fc2\.values has strides \(2048, 1, 64\)"):
        expert_mlp(x, ids, weights, QuantizedExpertWeights(experts.fc1, by_column), "triton")
    elsewhere = QuantizedExpertWeights(experts.fc1, experts.fc2.to("meta"))
    with pytest.raises(ValueError, match="on cpu, meta; they must share one device"):
        expert_mlp(x, ids, weights, elsewhere, "triton")


def test_takes_the_slots_of_a_cache(monkeypatch):
    pretend_there(monkeypatch, "triton")
    x, ids, weights, _ = problem()
    slots = ExpertWeights(empty_slots(3, 12, 8, x.dtype), empty_slots(3, 8, 6, x.dtype))
    assert triton_experts.misfit(ExpertCall(x, ids, weights, slots)) is None


def test_no_distribution_of_rows_needs_more_tiles_than_the_bound_and_one_needs_all():
    pytest.importorskip("triton", reason="Triton has no package for this system")
    from moeyard.kernels.gpu.grouping import max_tiles

    choose = random.Random(0)
    for _ in range(300):
        rows, slots, size = choose.randint(0, 400), choose.randint(1, 9), choose.choice([16, 128])
        cuts = sorted(choose.randint(0, rows) for _ in range(slots - 1))
        counts = [b - a for a, b in zip([0, *cuts], [*cuts, rows], strict=True)]
        bound = max_tiles(rows, slots, size)
        assert sum(-(-count // size) for count in counts) <= bound
        # One row everywhere, and the others where they fill tiles.
        spread = min(rows, slots)
        worst = [1] * (spread - 1) + [rows - spread + 1] * (spread > 0)
        assert sum(-(-count // size) for count in worst) == bound


def test_tiles_hold_an_experts_rows_until_they_are_large():
    assert [tile_rows(n * 8, 8) for n in (0, 1, 8, 9, 16, 17, 64, 65, 4096)] == [
        *(16, 16, 16, 32, 32, 64, 64, 128, 128)
    ]
