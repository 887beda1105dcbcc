"""When the Triton router is chosen, and its messages when it cannot be; without a GPU."""

import warnings

import pytest
import torch

from moeyard.kernels import trust
from moeyard.kernels.checks import router as router_check
from moeyard.kernels.gpu import choice as triton_choice
from moeyard.kernels.gpu import device as triton_device
from moeyard.kernels.router import choose
from moeyard.kernels.torch_ops.router import choose_torch
from moeyard.kernels.values.choice import ChoiceRule

GPU = torch.device("cuda", 0)


def logits(experts=6, dtype=torch.float32):
    return torch.randn(5, experts, dtype=dtype, generator=torch.Generator().manual_seed(0))


def test_a_cpu_takes_torch_by_itself_and_refuses_triton_in_a_sentence():
    rule = ChoiceRule(k=2)
    found, expected = (run(logits(), None, None, rule, True) for run in (choose, choose_torch))
    for actual, wanted in zip(found[:3] + found[3], expected[:3] + expected[3], strict=True):
        assert torch.equal(actual, wanted)
    with pytest.raises(ValueError, match=r"needs a CUDA device\. Use backend 'torch'\."):
        choose(logits(), None, None, rule, False, "triton")


def test_says_what_the_router_does_not_take(monkeypatch):
    monkeypatch.setattr(triton_choice, "why_not", lambda device: None)
    rule = ChoiceRule(k=2)
    with pytest.raises(ValueError, match=r"takes fp32 logits, not torch\.float64"):
        choose(logits(dtype=torch.float64), None, None, rule, False, "triton")
    with pytest.raises(ValueError, match="takes at most 1024 experts, not 1025"):
        choose(logits(1025), None, None, rule, False, "triton")


@pytest.mark.parametrize("broken", ["weights of softmax scores are off by 5e-01", None])
def test_a_router_that_fails_its_self_check_warns_once_and_is_not_taken(monkeypatch, broken):
    asked = []

    def check(choose, device):
        assert choose is triton_choice.choose_triton
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        asked.append(device)
        return broken

    monkeypatch.setattr(router_check, "problem_with", check)
    monkeypatch.setattr(trust, "_router_verdicts", {})
    with warnings.catch_warnings(record=True) as said, torch.inference_mode():
        warnings.simplefilter("always")
        found = {trust.triton_router_computes(GPU) for _ in "ab"}
    assert found == {broken is None} and asked == [GPU]
    assert len(said) == (broken is not None)
    assert broken is None or broken in str(said[0].message)


@pytest.mark.parametrize("part", ["experts", "weights", "sums", "gradients", "an exception"])
def test_the_self_check_sees_what_a_wrong_kernel_does(part):
    """Torch's path stands in for the kernels; then one part of it is made wrong."""

    def wrong(logits_TE, bias_E, valid_T, rule, wants_sums):
        if part == "an exception":
            raise RuntimeError("no kernel\nimage")
        if part == "gradients":
            logits_TE = logits_TE.detach() + (logits_TE - logits_TE.detach()) * 1.001
        made = choose_torch(logits_TE, bias_E, valid_T, rule, wants_sums)
        if part == "experts":
            return made._replace(experts_TK=made.experts_TK.flip(1))
        if part == "weights":
            return made._replace(weights_TK=made.weights_TK * 1.001)
        if part == "sums":
            return made._replace(sums=made.sums._replace(z_sum=made.sums.z_sum * 1.001))
        return made

    assert router_check.problem_with(choose_torch, torch.device("cpu")) is None
    problem = router_check.problem_with(wrong, torch.device("cpu"))
    expected = {"sums": "z sums", "an exception": "RuntimeError: no kernel image"}.get(part, part)
    assert problem is not None and problem.startswith(expected)


def test_the_doctor_says_how_the_router_does(monkeypatch):
    if not torch.cuda.is_available():
        assert trust.router_state() == "not available: Triton needs a CUDA device."
    monkeypatch.setattr(triton_device, "why_not", lambda device: None)
    for problem, expected in ((None, "passes its"), ("weights are off", "FAILED its")):
        monkeypatch.setattr(router_check, "problem_with", lambda _, __, p=problem: p)
        assert trust.router_state().startswith(expected)
