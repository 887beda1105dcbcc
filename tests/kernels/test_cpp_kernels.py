"""The C++ kernels on every instruction set this processor has, against torch in fp64."""

import os
import threading
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from moeyard.kernels.cpu import library
from moeyard.kernels.cpu.linear import linear
from moeyard.kernels.cpu.norm import rms_norm
from moeyard.kernels.experts import expert_mlp
from moeyard.kernels.router import project_and_choose
from moeyard.kernels.values.activation import ACTIVATIONS, UNGATED, fc1_rows
from moeyard.kernels.values.expert_weights import ExpertWeights
from moeyard.kernels.values.main_grads import MainGrads
from moeyard.kernels.values.quantize import quantize_experts
from moeyard.kernels.waves import start_waves
from moeyard.moe.routers.router import RouterSizes
from moeyard.moe.routers.routing import RouterInput
from moeyard.moe.routers.topk import TopK

FUNCTIONS = library.load().functions
pytestmark = [
    pytest.mark.skipif(FUNCTIONS is None, reason=library.load().state),
    pytest.mark.usefixtures("instruction_set", "no_gradients"),
]
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2e-2}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)


def random(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * shape[-1] ** -0.25).to(dtype)


def assert_near(found, expected):
    error = (found.double() - expected).abs().max() / expected.abs().max()
    assert error < TOLERANCE[found.dtype], f"off by {float(error)}"


@DTYPES
@pytest.mark.parametrize(
    "rows, width, outputs", [(1, 1, 1), (2, 31, 5), (7, 64, 130), (201, 75, 3)]
)
def test_a_linear_layer_agrees_with_fp64(dtype, rows, width, outputs):
    x, weight = random(rows, width, dtype=dtype), random(outputs, width, seed=1, dtype=dtype)
    assert_near(linear(x, weight), F.linear(x.double(), weight.double()))


@DTYPES
def test_a_row_has_the_same_bits_alone_and_among_others_on_any_number_of_threads(dtype):
    x, weight = random(210, 333, dtype=dtype), random(70, 333, seed=1, dtype=dtype)
    torch.set_num_threads(1)
    expected = linear(x, weight)
    torch.set_num_threads(3)
    for count in (1, 2, 3, 4, 5, 6, 7, 9, 96, 97, 210):
        assert torch.equal(linear(x[:count], weight), expected[:count])
        assert torch.equal(linear(x[-count:], weight), expected[-count:])


@DTYPES
def test_norms_agree_with_fp64(dtype):
    x, weight = random(3, 5, 23, dtype=dtype), random(23, seed=1, dtype=dtype)
    expected = F.rms_norm(x.double(), (23,), weight.double(), 1e-5)
    assert_near(rms_norm(x, weight, 1e-5), expected)


BIASES = pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "biased"])


def biases_for(experts, d_model, d_expert, dtype, activation="swiglu"):
    """Return biases about as large as the values they are added to."""
    shapes = (experts, fc1_rows(d_expert, activation)), (experts, d_model)
    return [(2 * random(*shape, seed=5)).to(dtype) for shape in shapes]


@DTYPES
@BIASES
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("tokens, choices, experts", [(1, 1, 1), (9, 3, 3), (130, 2, 5)])
def test_experts_agree_with_the_reference(dtype, has_bias, activation, tokens, choices, experts):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(-1, experts, (tokens, choices), generator=generator)
    weights = torch.rand(tokens, choices, generator=generator)
    x = random(tokens, 45, dtype=dtype)
    fc1 = random(experts, fc1_rows(70, activation), 45, seed=1, dtype=dtype)
    fc2 = random(experts, 45, 70, seed=2, dtype=dtype)
    biases = biases_for(experts, 45, 70, dtype, activation) if has_bias else []
    y = expert_mlp(x, ids, weights, ExpertWeights.of((fc1, fc2, *biases), activation=activation))
    wide = [part.double() for part in (fc1, fc2, *biases)]
    wide = ExpertWeights.of(wide, activation=activation)
    expected = expert_mlp(x.double(), ids, weights.double(), wide, "reference")
    if ids.max() >= 0:
        assert_near(y, expected)
    assert torch.equal(y[(ids < 0).all(dim=1)], torch.zeros_like(y[(ids < 0).all(dim=1)]))


TRAINING = {  # tokens, choices, experts, D, F
    "few": (3, 2, 4, 6, 10),
    "rests": (150, 2, 3, 70, 34),
    "deep": (1100, 1, 1, 24, 520),
    "wide": (40, 2, 2, 530, 66),
}


TRAINED = [
    pytest.param(activation, TRAINING[name], id=f"{activation}-{name}")
    for activation in ACTIVATIONS
    for name in (("few", "rests") if activation in UNGATED else TRAINING)
]


@DTYPES
@BIASES
@pytest.mark.parametrize(("activation", "shape"), TRAINED)
def test_training_has_the_values_and_gradients_of_the_reference(dtype, has_bias, activation, shape):
    tokens, choices, experts, d_model, d_expert = shape
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(-1, experts + 1, (tokens, choices), generator=generator)
    ids[ids == experts] = 0  # so that expert 0 has many rows
    x = random(tokens, d_model, dtype=dtype)
    d_hidden = fc1_rows(d_expert, activation)
    fc1 = random(experts + 1, d_hidden, d_model, seed=1, dtype=dtype)  # the last has no rows
    fc2 = random(experts + 1, d_model, d_expert, seed=2, dtype=dtype)
    leaves = [x, torch.rand(tokens, choices, generator=generator), fc1, fc2]
    leaves += biases_for(experts + 1, d_model, d_expert, dtype, activation) if has_bias else []
    upstream = random(tokens, d_model, seed=4, dtype=dtype)
    found = values_and_gradients(leaves, ids, activation, upstream)
    expected = values_and_gradients([t.double() for t in leaves], ids, activation, upstream)
    for actual, wanted in zip(found, expected, strict=True):
        assert_near(actual.to(dtype), wanted)
    assert not any(gradient[-1].any() for gradient in found[3:])
    again = values_and_gradients(leaves, ids, activation, upstream)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


def values_and_gradients(leaves, ids, activation, upstream):
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    x, weights, fc1, fc2, *biases = leaves
    with torch.enable_grad():
        experts = ExpertWeights.of((fc1, fc2, *biases), activation=activation)
        backend = "reference" if x.dtype == torch.float64 else "cpp"
        y = expert_mlp(x, ids, weights, experts, backend)
        return y.detach(), *torch.autograd.grad(y, leaves, upstream.to(y.dtype))


@BIASES
def test_gradients_of_the_experts_are_added_to_main_gradients_or_begin_them(has_bias):
    ids, weights = torch.tensor([[0, 2], [2, -1]]), torch.rand(2, 2)
    x, fc1, fc2 = random(2, 8), random(3, 12, 8, seed=1), random(3, 8, 6, seed=2)
    biases = biases_for(3, 8, 6, torch.float32) if has_bias else []
    leaves = [x, weights, fc1, fc2, *biases]
    _, _, _, *expected = values_and_gradients(leaves, ids, "swiglu", torch.ones(2, 8))
    totals = [torch.full(leaf.shape, torch.nan) for leaf in leaves[2:]]
    sums = MainGrads.of(totals, is_empty=True)
    for times in (1, 2):
        with torch.enable_grad():
            experts = ExpertWeights.of((fc1.requires_grad_(), fc2, *biases), main_grads=sums)
            expert_mlp(x, ids, weights, experts).sum().backward()
        assert fc1.grad is None and not sums.is_empty
        for total, one in zip(totals, expected, strict=True):
            torch.testing.assert_close(total, times * one)


def test_no_tokens_give_no_rows():
    fc1, fc2 = random(2, 16, 4), random(2, 4, 8)
    empty = torch.empty(0, 2)
    assert expert_mlp(torch.empty(0, 4), empty.int(), empty, ExpertWeights(fc1, fc2)).shape == (
        0,
        4,
    )
    assert linear(torch.empty(0, 4), fc1[0]).shape == (0, 16)


def test_weights_of_absent_choices_and_their_lines_are_never_read():
    x, fc1, fc2 = random(2, 4), random(1, 16, 4), random(1, 4, 8)
    ids, weights = torch.tensor([[0, -1], [-1, -1]]), torch.tensor([[1.0, float("nan")]] * 2)
    y = expert_mlp(x, ids, weights, ExpertWeights(fc1, fc2))
    assert y.isfinite().all() and not y[1].any()


@pytest.mark.parametrize("expert", [-2, 3, 2**31 - 1])
def test_expert_ids_out_of_range_are_refused(expert):
    weights = ExpertWeights(random(3, 16, 4), random(3, 4, 8))
    with pytest.raises(ValueError, match=f"expert id {expert} is outside"):
        expert_mlp(random(1, 4), torch.tensor([[0, expert]]), torch.ones(1, 2), weights)


def test_rows_whose_expert_is_missing_are_our_bug_outside_waves():
    weights = ExpertWeights(random(1, 16, 4), random(1, 4, 8), slot_of_E=(-1, 0))
    ids = torch.tensor([[0, 1]])
    with pytest.raises(AssertionError, match="expert 0 has rows but no slot"):
        expert_mlp(random(1, 4), ids, torch.ones(1, 2), weights)
    start_waves(random(1, 4), ids, torch.ones(1, 2), 2).add(weights, only=[1])


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
def test_results_do_not_depend_on_the_default_type(default):
    ids, weights = torch.tensor([[0, 2], [2, -1]]), torch.rand(2, 2)
    x, fc1, fc2 = random(2, 8), random(3, 12, 8, seed=1), random(3, 8, 6, seed=2)
    expected = values_and_gradients([x, weights, fc1, fc2], ids, "swiglu", torch.ones(2, 8))
    torch.set_default_dtype(default)
    try:
        y = expert_mlp(x, ids, weights, ExpertWeights(fc1, fc2), "cpp")
        found = values_and_gradients([x, weights, fc1, fc2], ids, "swiglu", torch.ones(2, 8))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.allclose(y, expected[0], atol=1e-6)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


ROUTERS = {
    "plain": {},
    "sums": {"renormalize": False, "scale": 2.5},
    "sigmoid_with_bias": {"score": "sigmoid", "bias_update_rate": 0.1},
    "groups": {"score": "sigmoid", "num_groups": 6, "top_groups": 2, "bias_update_rate": 0.1},
    "softmax_groups": {"num_groups": 3, "top_groups": 2},
    "groups_by_best": {"num_groups": 6, "top_groups": 2, "group_score": "max"},
    "logit_bias": {"logit_bias": True},
    "sigmoid_logit_bias": {"score": "sigmoid", "logit_bias": True, "bias_update_rate": 0.1},
}


def routers(dtype, **options):
    """Return a router and x, on which the C++ kernels run, and both in fp64."""
    torch.manual_seed(0)
    router = TopK(k=4, **options).build(RouterSizes(37, 18)).eval()
    if router.e_score_correction_bias is not None:
        router.e_score_correction_bias += torch.linspace(-0.3, 0.3, 18)
    if router.bias is not None:
        router.bias += torch.linspace(1.0, -1.0, 18)
    x = random(57, 37, dtype=dtype)
    wide = TopK(k=4, **options).build(RouterSizes(37, 18)).eval().double()
    wide.load_state_dict(router.state_dict())
    return router, x, wide


@DTYPES
@pytest.mark.parametrize("options", ROUTERS.values(), ids=ROUTERS)
def test_routers_choose_and_weigh_as_in_fp64(dtype, options):
    router, x, wide = routers(dtype, **options)
    found, expected = router.route(RouterInput(x)), wide.route(RouterInput(x.double()))
    bias = router.e_score_correction_bias
    assert project_and_choose(x, router.weight, router.bias, bias, router.rule) is not None
    assert found.experts_TK.dtype == torch.int32 and found.weights_TK.dtype == torch.float32
    assert torch.equal(found.experts_TK, expected.experts_TK)
    torch.testing.assert_close(found.weights_TK.double(), expected.weights_TK, rtol=2e-5, atol=1e-6)
    assert torch.equal(found.counts_E, expected.counts_E)
    assert int(found.num_tokens) == int(expected.num_tokens) == 57
    alone = router.route(RouterInput(x[5:6]))
    assert torch.equal(alone.weights_TK, found.weights_TK[5:6])


def test_equal_scores_go_to_the_lower_expert():
    router = TopK(k=4).build(RouterSizes(8, 18)).eval()
    router.weight.zero_()
    assert router.route(RouterInput(random(2, 8))).experts_TK.tolist() == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize("group_score", ["top2", "max"])
def test_equal_groups_go_to_the_lower_one(group_score):
    groups = {"num_groups": 6, "top_groups": 1, "group_score": group_score}
    router = TopK(k=3, logit_bias=True, **groups).build(RouterSizes(8, 18)).eval()
    router.weight.zero_()
    for best, expected in (([], [0, 1, 2]), ([9, 10, 12, 13], [9, 10, 11])):
        router.bias.zero_()
        router.bias[best] = 1.0
        assert router.route(RouterInput(random(2, 8))).experts_TK.tolist() == [expected] * 2


def test_a_group_is_judged_by_its_best_or_by_its_two_best():
    for group_score, expected in (("top2", [3, 4, 5]), ("max", [6, 7, 8])):
        groups = {"num_groups": 6, "top_groups": 1, "group_score": group_score}
        router = TopK(k=3, logit_bias=True, **groups).build(RouterSizes(8, 18)).eval()
        router.weight.zero_()
        router.bias[3:5], router.bias[6] = 1.0, 1.4  # e + e > e^1.4 + 1
        assert router.route(RouterInput(random(2, 8))).experts_TK.tolist() == [expected] * 2


def test_scores_that_are_not_numbers_still_name_different_experts():
    for options in ROUTERS.values():
        router, x, _ = routers(torch.float32, **options)
        chosen = router.route(RouterInput(torch.full_like(x, torch.nan))).experts_TK
        assert all(len({*row}) == 4 and min(row) >= 0 and max(row) < 18 for row in chosen.tolist())


def test_callers_in_several_threads_and_in_forked_children_get_right_results():
    torch.set_num_threads(2)
    x, weight = random(64, 256), random(512, 256)
    expected = linear(x, weight)
    wrong = []

    def call():
        with torch.no_grad():
            wrong.extend(1 for _ in range(50) if not torch.equal(linear(x, weight), expected))

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    child = os.fork()
    if not child:  # it has no helper threads, and its pool may be in the middle of a job
        os._exit(0 if torch.equal(linear(x, weight), expected) else 1)
    for caller in callers:
        caller.join()
    assert not wrong
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


QUANTIZED = {  # bits, group, D, F: whole chunks, parts of chunks, several steps in a group
    "int8": (8, None, 1088, 96),
    "int8_groups": (8, 32, 160, 96),
    "int8_odd_groups": (8, 96, 192, 96),
    "int4": (4, 64, 192, 64),
    "int4_small_groups": (4, 32, 416, 96),
    "int4_odd_groups": (4, 96, 288, 96),
    "int4_large_groups": (4, 1056, 1056, 1056),
}


def quantized_problem(name, tokens, dtype, bias_dtype=None):
    bits, group, d_model, d_expert = QUANTIZED[name]
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(-1, 3, (tokens, 2), generator=generator)
    fc1 = random(3, 2 * d_expert, d_model, seed=1) * d_model**-0.5
    fc2 = random(3, d_model, d_expert, seed=2) * d_expert**-0.5
    biases = [] if bias_dtype is None else biases_for(3, d_model, d_expert, bias_dtype)
    experts = quantize_experts(ExpertWeights(fc1, fc2), bits, group)
    experts = replace(experts, **dict(zip(("fc1_bias_SH", "fc2_bias_SD"), biases, strict=False)))
    x = random(tokens, d_model).to(dtype)
    return x, ids, torch.rand(tokens, 2, generator=generator), experts


@DTYPES
@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_experts_agree_with_the_reference(name, dtype):
    x, ids, weights, experts = quantized_problem(name, 23, dtype)
    y = expert_mlp(x, ids, weights, experts, "cpp")
    expected = expert_mlp(x.double(), ids, weights.double(), experts, "reference")
    error = (y.double() - expected).abs().max() / expected.abs().max()
    assert error <= {torch.float32: 1e-4, torch.bfloat16: 1e-2}[dtype]


@DTYPES
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["int8", "int4_small_groups"])
def test_biases_of_quantized_experts_may_be_wider_or_narrower_than_rows(name, bias_dtype, dtype):
    x, ids, weights, experts = quantized_problem(name, 23, dtype, bias_dtype)
    expected = expert_mlp(x.double(), ids, weights.double(), experts, "reference")
    for backend, limits in (("cpp", (1e-4, 1e-2)), ("torch", (2e-4, 2e-2))):
        y = expert_mlp(x, ids, weights, experts, backend)
        error = (y.double() - expected).abs().max() / expected.abs().max()
        assert error <= limits[dtype == torch.bfloat16], backend


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_quantized_row_does_not_depend_on_the_rows_beside_it(name):
    x, ids, weights, experts = quantized_problem(name, 230, torch.bfloat16)
    together = expert_mlp(x, ids, weights, experts, "cpp")
    for t in (0, 3, 101, 229):
        row = slice(t, t + 1)
        alone = expert_mlp(x[row], ids[row], weights[row], experts, "cpp")
        assert torch.equal(alone, together[row])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_shows_in_its_own_row_only(value):
    x, ids, weights, experts = quantized_problem("int8", 23, torch.float32)
    ids = ids.clamp(min=0)
    x[4, 17] = value
    y = expert_mlp(x, ids, weights, experts, "cpp")
    assert y[4].isnan().all() and y[:4].isfinite().all() and y[5:].isfinite().all()


def test_rows_of_zeros_and_of_subnormals_give_zeros():
    x, ids, weights, experts = quantized_problem("int4", 2, torch.float32)
    x[0], x[1] = 0, 1e-42
    assert not expert_mlp(x, ids.clamp(min=0), weights, experts, "cpp").any()


@pytest.mark.parametrize("expert", [3, -2, 1 << 32, -(1 << 40)])
def test_ids_out_of_range_are_refused_however_wide_they_are(expert):
    x, ids, weights, experts = quantized_problem("int8", 5, torch.float32)
    ids[2, 1] = expert
    with pytest.raises(ValueError, match=r"is outside \[-1, 3\)"):
        expert_mlp(x, ids, weights, experts, "cpp")
