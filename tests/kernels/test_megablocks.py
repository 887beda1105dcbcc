"""Our code around MegaBlocks, on a stand-in for its grouped product; and when it is refused.

MegaBlocks itself needs CUDA; the last test runs it where it is installed.
"""

import importlib
import importlib.util
import types

import pytest
import torch

from moeyard.kernels import experts as door
from moeyard.kernels.checks.experts import check_backend
from moeyard.kernels.experts import MEGABLOCKS, check_backends, expert_mlp
from moeyard.kernels.torch_ops import megablocks as megablocks_backend
from moeyard.kernels.torch_ops.megablocks import why_not
from moeyard.kernels.values.expert_weights import ExpertWeights
from moeyard.kernels.values.main_grads import MainGrads
from moeyard.kernels.values.quantize import quantize
from moeyard.kernels.values.quantized_weights import QuantizedExpertWeights

from backends import pretend_there

CPU, GPU = torch.device("cpu"), torch.device("cuda")
T, K, E, D, F = 37, 2, 5, 24, 40


def gmm(a, b, batch_sizes, trans_a=False, trans_b=False, c=None):
    """Compute what grouped_gemm.backend.gmm does, with its checks; idle sums are not written."""
    assert not (trans_a and trans_b) and c is None
    assert batch_sizes.device == CPU and batch_sizes.dtype == torch.int64
    assert a.is_contiguous() and b.is_contiguous() and a.dtype == b.dtype == torch.bfloat16
    assert a.ndim == 2 and b.ndim == (2 if trans_a else 3) and int(batch_sizes.sum()) > 0
    ends = batch_sizes.cumsum(0).tolist()
    spans = list(zip([0, *ends], ends, strict=False))
    if trans_a:
        assert len(a) == len(b)
        out = torch.full((len(spans), a.shape[1], b.shape[1]), torch.nan, dtype=a.dtype)
        for group, (start, end) in enumerate(spans):
            if start < end:
                out[group] = a[start:end].t() @ b[start:end]
        return out
    assert len(b) == len(spans)
    out = torch.full((len(a), b.shape[1 if trans_b else 2]), torch.nan, dtype=a.dtype)
    for group, (start, end) in enumerate(spans):
        out[start:end] = a[start:end] @ (b[group].t() if trans_b else b[group])
    return out


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(megablocks_backend, "_load", lambda: (gmm, None))
    pretend_there(monkeypatch, "megablocks")


def problem(ids_from=-1, slots=E, has_bias=False):
    g = torch.Generator().manual_seed(0)
    x, weights = torch.randn(T, D, generator=g), torch.rand(T, K, generator=g)
    fc1 = torch.randn(slots, 2 * F, D, generator=g) * D**-0.5
    fc2 = torch.randn(slots, D, F, generator=g) * F**-0.5
    ids = torch.randint(ids_from, E - 1, (T, K), generator=g)  # the last expert is idle
    leaves = [x.bfloat16(), weights, fc1.bfloat16(), fc2.bfloat16()]
    if has_bias:
        leaves += (torch.randn(slots, w, generator=g).bfloat16() for w in (2 * F, D))
    return ids, [leaf.requires_grad_() for leaf in leaves]


def outcome(ids, leaves, backend="megablocks", table=None, **more):
    x, weights, fc1, fc2, *biases = leaves
    experts = ExpertWeights.of((fc1, fc2, *biases), slot_of_E=table)
    y = expert_mlp(x, ids, weights, experts, backend, **more)
    upstream = torch.cos(torch.arange(y.numel())).view_as(y).to(y)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream)]


def assert_near(found, expected):
    for actual, wanted in zip(found, expected, strict=True):
        error = (actual.double() - wanted).abs().max() / max(1.0, wanted.abs().max())
        assert error <= 3e-2


BIASES = pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "biased"])


@BIASES
@pytest.mark.parametrize("kind", ["random", "some_without", "one_takes_all", "nobody"])
def test_glue_agrees_with_the_reference_in_values_and_all_gradients(stand_in, kind, has_bias):
    ids, leaves = problem(0 if kind == "random" else -1, has_bias=has_bias)
    if kind == "one_takes_all":
        ids = torch.full_like(ids, 2)
    elif kind == "nobody":
        ids = torch.full_like(ids, -1)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    assert_near(outcome(ids, leaves), outcome(ids, exact, "reference"))


@BIASES
def test_a_share_of_the_experts_agrees_with_the_reference(stand_in, has_bias):
    ids, leaves = problem(slots=2, has_bias=has_bias)
    table = (-1, -1, 0, 1, -1)
    ids = torch.where((ids == 2) | (ids == 3), ids, -1)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = outcome(ids, exact, "reference", table)
    assert_near(outcome(ids, leaves, table=table), expected)


@BIASES
def test_adds_to_main_gradients_and_recomputes_with_the_same_bits(stand_in, has_bias):
    ids, leaves = problem(has_bias=has_bias)
    plain = outcome(ids, leaves)
    for actual, expected in zip(outcome(ids, leaves, recompute=True), plain, strict=True):
        assert torch.equal(actual, expected)
    x, weights, fc1, fc2, *biases = leaves
    ones = [torch.ones(leaf.shape) for leaf in leaves[2:]]
    sums = MainGrads.of(ones)
    experts = ExpertWeights.of((fc1, fc2, *biases), main_grads=sums)
    y = expert_mlp(x, ids, weights, experts, "megablocks")
    torch.autograd.grad(y, (x, weights), torch.cos(torch.arange(y.numel())).view_as(y).to(y))
    for total, one in zip(ones, plain[3:], strict=True):
        assert torch.equal(total, 1 + one.float())
    with torch.no_grad():
        y = expert_mlp(x, ids, weights, experts, "megablocks")
    assert torch.equal(y, plain[0])


def test_passes_the_self_check_on_its_stand_in_and_fails_it_where_products_are_wrong(
    stand_in, monkeypatch
):
    assert check_backend("megablocks", MEGABLOCKS.run, torch.bfloat16, "cpu").passed

    def wrong(*arguments, **options):
        return gmm(*arguments, **options) * 1.1

    monkeypatch.setattr(megablocks_backend, "_load", lambda: (wrong, None))
    assert check_backend("megablocks", MEGABLOCKS.run, torch.bfloat16, "cpu").failed


def test_the_doctor_checks_the_type_that_it_takes(monkeypatch):
    checked = []
    pretend_there(monkeypatch, "megablocks")
    monkeypatch.setattr(door, "check_backend", lambda *a: checked.append(a))
    list(check_backends())
    assert [dtype for backend, _, dtype, _ in checked if backend == "megablocks"] == [
        torch.bfloat16
    ]


def test_says_what_it_does_not_take(stand_in):
    ids, (x, weights, fc1, fc2) = problem()

    def refused(x, fc1, fc2, table=None):
        with pytest.raises(ValueError, match=r" Use backend 'auto'\.$") as caught:
            expert_mlp(x, ids, weights, ExpertWeights(fc1, fc2, slot_of_E=table), "megablocks")
        return str(caught.value)

    assert "take bf16, not torch.float32" in refused(x.float(), fc1.float(), fc2.float())
    assert "order of their slots" in refused(x, fc1, fc2, (1, 0, 2, 3, 4))
    assert "fc2 has strides" in refused(x, fc1, fc2.mT.contiguous().mT)
    assert "a side of 36" in refused(x, fc1[:, :72].contiguous(), fc2[..., :36].contiguous())
    square = quantize(torch.randn(E, 32, 32), 8)
    quantized = QuantizedExpertWeights(quantize(torch.randn(E, 64, 32), 8), square)
    with pytest.raises(ValueError, match="does not take quantized experts"):
        expert_mlp(torch.randn(T, 32).bfloat16(), ids, weights.detach(), quantized, "megablocks")


@pytest.fixture
def fresh(monkeypatch):
    """Make MegaBlocks seem installed; each test decides what importing it does. No caches."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    megablocks_backend._load.cache_clear()
    yield monkeypatch
    megablocks_backend._load.cache_clear()


def test_says_in_one_sentence_why_it_is_not_there(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    reason = why_not(GPU)
    assert reason == "MegaBlocks is not installed; docs/backends.md says how to build it."
    ids, (x, weights, fc1, fc2) = problem()
    with pytest.raises(ValueError, match=r"MegaBlocks is not installed; .* Use backend 'auto'\."):
        expert_mlp(x, ids, weights, ExpertWeights(fc1, fc2), "megablocks")
    (row,) = [check for check in check_backends() if check.backend == "megablocks"]
    assert row.unavailable == reason and not row.failed


def test_is_not_imported_without_a_gpu(fresh):
    def never(name):
        raise AssertionError(f"{name} was imported")

    fresh.setattr(importlib, "import_module", never)
    assert why_not(CPU) == "MegaBlocks needs a CUDA device."


def test_says_why_it_cannot_be_imported_and_tries_once(fresh):
    tried = []

    def broken(name):
        tried.append(name)
        raise ImportError("undefined symbol:\n _ZN3c10. ")

    fresh.setattr(importlib, "import_module", broken)
    for _ in range(2):
        assert why_not(GPU) == (
            "MegaBlocks is installed but not importable (ImportError: undefined symbol: _ZN3c10); "
            "docs/backends.md says how to build it."
        )
    assert tried == ["megablocks.grouped_gemm_util"]


@pytest.mark.parametrize("has_products", [True, False])
def test_needs_its_grouped_products(fresh, has_products):
    util = types.SimpleNamespace(backend=types.SimpleNamespace(gmm=gmm) if has_products else None)
    fresh.setattr(importlib, "import_module", lambda name: util)
    reason = why_not(GPU)
    assert (reason is None) == has_products
    assert reason is None or "without its grouped_gemm" in reason


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [61, 4000])
def test_megablocks_itself_passes_the_self_check(tokens):
    reason = why_not(GPU)
    if reason is not None:
        pytest.skip(reason)
    check = check_backend("megablocks", MEGABLOCKS.run, torch.bfloat16, "cuda", tokens)
    assert check.passed, check
