"""Kernels that failed their check are not used, and tensors they never take load nothing."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moeyard.kernels import trust
from moeyard.kernels.cpu import library, structures
from moeyard.kernels.cpu.library import Library
from moeyard.kernels.experts import expert_mlp
from moeyard.kernels.gpu import choice as triton_choice
from moeyard.kernels.gpu import experts as triton_experts
from moeyard.kernels.grouped_linear import grouped_linear
from moeyard.kernels.linear import linear
from moeyard.kernels.norm import rms_norm
from moeyard.kernels.router import project_and_choose
from moeyard.kernels.torch_ops import experts as torch_experts
from moeyard.kernels.torch_ops.loop import Span
from moeyard.kernels.torch_ops.router import choose_torch
from moeyard.kernels.values.choice import ChoiceRule
from moeyard.kernels.values.expert_weights import ExpertWeights
from moeyard.kernels.waves import start_waves

needs_kernels = pytest.mark.skipif(library.load().functions is None, reason="no C++ kernels here")


class Untouched:
    """Stands for a library that computes wrong. A call of any of its functions fails the test."""

    def __getattr__(self, name):
        raise AssertionError(f"{name} was called although the kernels failed their check")


@pytest.fixture
def failed(monkeypatch):
    wrong = Library(Untouched(), "avx2")
    monkeypatch.setattr(library, "_loaded", wrong)
    monkeypatch.setattr(trust, "_cpp_verdict", (wrong, Library(None, "computes wrong", True)))


X, WEIGHT = torch.randn(5, 64), torch.randn(64, 64)
IDS, WEIGHTS = torch.zeros(5, 1, dtype=torch.int32), torch.ones(5, 1)
EXPERTS = ExpertWeights(torch.randn(2, 64, 64), torch.randn(2, 64, 32))


def experts_in_waves():
    waves = start_waves(X, IDS, WEIGHTS, 2)
    waves.add(EXPERTS)
    return waves.result()


DOORS = {
    "linear": lambda: linear(X, WEIGHT),
    "norm": lambda: rms_norm(X, torch.ones(64), 1e-6),
    "router": lambda: project_and_choose(X, WEIGHT[:8], None, None, ChoiceRule(k=2)),
    "experts": lambda: expert_mlp(X, IDS, WEIGHTS, EXPERTS),
    "waves": experts_in_waves,
}


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
def test_no_door_uses_kernels_that_failed_their_check(failed, door):
    with torch.no_grad():
        found = door()
    assert found is None or torch.isfinite(found).all()


@pytest.mark.parametrize("wants_grad", [False, True])
def test_no_training_door_uses_kernels_that_failed_their_check(failed, wants_grad):
    x = X.clone().requires_grad_(wants_grad)
    grouped_linear(x, EXPERTS.fc1_SHD, [Span(0, 0, 5)]).sum()
    expert_mlp(x, IDS, WEIGHTS, EXPERTS).sum()


def test_an_explicit_wish_for_kernels_that_failed_is_refused(failed):
    with pytest.raises(ValueError, match="backend is 'cpp', but computes wrong"):
        expert_mlp(X, IDS, WEIGHTS, EXPERTS, "cpp")


@pytest.mark.parametrize(
    "x", [X.to("meta"), X.double(), X.half()], ids=["another device", "fp64", "fp16"]
)
def test_tensors_that_the_kernels_never_take_load_nothing(monkeypatch, x):
    def never():
        raise AssertionError("the library was loaded")

    monkeypatch.setattr(library, "load", never)
    weight = WEIGHT.to(x.device, x.dtype)
    with torch.no_grad():
        linear(x, weight)
        rms_norm(x, weight[0], 1e-6)
        assert project_and_choose(x, weight, None, None, ChoiceRule(k=2)) is None


@needs_kernels
def test_a_structure_of_another_size_is_found(monkeypatch):
    functions = library.load().functions
    assert structures.misfit(functions) is None
    shorter = type("NormArguments", (structures.ctypes.Structure,), {"_fields_": []})
    changed = tuple(
        shorter if one is structures.NormArguments else one for one in structures.STRUCTURES
    )
    monkeypatch.setattr(structures, "STRUCTURES", changed)
    assert "NormArguments has" in structures.misfit(functions)
    monkeypatch.setattr(structures, "STRUCTURES", structures.STRUCTURES[:1])
    assert structures.misfit(functions) is not None


@needs_kernels
def test_compiling_without_gradients_asks_the_verdict_without_a_break():
    with torch.no_grad():
        compiled = torch.compile(lambda x: trust.may_use_cpp(x), backend="eager", fullgraph=True)
        assert compiled(X) is True


def test_a_self_check_inside_a_checkpointed_layer_leaves_the_layer_alone(monkeypatch):
    """The first call of a kind may come there, as with train.recompute: true."""
    cpu = torch.device("cpu")
    monkeypatch.setattr(triton_experts, "run", torch_experts.run)
    monkeypatch.setattr(triton_choice, "choose_triton", choose_torch)
    monkeypatch.setattr(trust, "_triton_verdicts", {})
    monkeypatch.setattr(trust, "_router_verdicts", {})
    calls = []

    def layer(x):
        calls.append(x)
        assert trust.triton_computes(torch.float32, cpu, None, False)
        assert trust.triton_router_computes(cpu)
        return x.sin().cos()

    x = torch.randn(5, requires_grad=True)
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    torch.testing.assert_close(x.grad, -x.sin().sin() * x.cos())
    assert len(calls) == 2, "once forward, once again in backward"
