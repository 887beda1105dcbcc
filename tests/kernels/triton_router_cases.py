"""Cases of the Triton router against torch in fp64; they run twice.

In Triton's interpreter, in a separate process (test_triton_interpreted.py), and on a GPU
(test_triton_router_gpu.py).
"""

import pytest
import torch
import triton

import moeyard.kernels.router
from moeyard.kernels.gpu import router as router_kernels
from moeyard.kernels.router import choose
from moeyard.kernels.torch_ops.router import choose_torch
from moeyard.kernels.values.choice import ChoiceRule
from moeyard.moe.routers.losses import auxiliary_losses
from moeyard.moe.routers.routing import RouterInput
from moeyard.moe.routers.topk import TopK, TopKRouter

DEVICE = "cpu" if triton.knobs.runtime.interpret else "cuda"
TOLERANCE = 1e-5
NAMES = ("experts", "weights", "counts", "probability sums", "z sum", "grad logits")


def rule(k, **options):
    return ChoiceRule(k=k, **options)


# Rule, T, E, whether there is a bias.
CASES = {
    "softmax": (rule(2), 37, 5, False),
    "softmax_as_it_is": (rule(3, renormalize=False, scale=0.5), 37, 12, False),
    "softmax_with_bias": (rule(3), 37, 12, True),
    "sigmoid": (rule(3, score="sigmoid"), 37, 12, False),
    "sigmoid_as_it_is": (rule(2, score="sigmoid", renormalize=False), 37, 7, True),
    "deepseek": (rule(4, score="sigmoid", scale=2.5, num_groups=4, top_groups=2), 70, 32, True),
    "ragged_groups": (rule(4, num_groups=5, top_groups=2), 37, 15, False),
    "groups_by_best": (rule(4, num_groups=5, top_groups=2, group_best=1), 37, 15, True),
    "groups_of_one": (rule(2, num_groups=6, top_groups=3), 37, 6, True),
    "all_groups": (rule(5, score="sigmoid", num_groups=3, top_groups=3), 9, 6, True),
    "every_expert": (rule(7), 9, 7, False),
    "one_expert": (rule(1), 9, 1, False),
    "one_token": (rule(2), 1, 5, False),
    "no_token": (rule(2), 0, 5, True),
    "many_experts": (rule(10, renormalize=False), 3, 1000, False),
    "most_lanes": (rule(6, score="sigmoid", num_groups=33, top_groups=3), 3, 1023, True),
}


def problem(tokens, experts, has_bias, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, experts, generator=g) * 2
    bias = torch.randn(experts, generator=g) * 0.2 if has_bias else None
    valid = torch.rand(tokens, generator=g) < 0.7
    return logits.to(DEVICE), None if bias is None else bias.to(DEVICE), valid.to(DEVICE)


def outcome(logits, bias, valid, rule, backend="triton", parts=("weights", "p", "z")):
    """Return all outputs, and the gradient of a fixed weighted sum of some of them."""
    logits = logits.detach().requires_grad_()
    made = choose(logits, bias, valid, rule, True, backend)
    wanted = {"weights": made.weights_TK, "p": made.sums[0], "z": made.sums[1]}
    upstream = [torch.linspace(-1, 2, max(1, w.numel())).to(w).view_as(w) if w.numel() else w
                for w in wanted.values()]  # fmt: skip
    chosen = [name in parts for name in wanted]
    outs = [w for w, is_in in zip(wanted.values(), chosen, strict=True) if is_in]
    ups = [u for u, is_in in zip(upstream, chosen, strict=True) if is_in]
    (grad,) = torch.autograd.grad(outs, logits, ups) if outs else (None,)
    return made.experts_TK, made.weights_TK.detach(), made.counts_E, *wanted_sums(made), grad


def wanted_sums(made):
    return tuple(part.detach() for part in made.sums)


def expected_outcome(logits, bias, valid, rule, **more):
    exact = [None if x is None else x.double().cpu() for x in (logits, bias)]
    return outcome(*exact, None if valid is None else valid.cpu(), rule, "torch", **more)


def assert_near(found, expected):
    for name, actual, wanted in zip(NAMES, found, expected, strict=True):
        assert actual.shape == wanted.shape, name
        if not actual.dtype.is_floating_point:
            assert actual.dtype == wanted.dtype, name
            assert torch.equal(actual.cpu(), wanted), name
        elif wanted.numel():
            error = (actual.double().cpu() - wanted).abs().max() / max(1e-3, wanted.abs().max())
            assert error <= TOLERANCE, f"{name} is off by {float(error):.1e}"


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("has_valid", [False, True], ids=["all_valid", "some_valid"])
def test_agrees_with_torch_in_values_and_the_gradient(name, has_valid):
    rule, *size = CASES[name]
    logits, bias, valid = problem(*size)
    arguments = (logits, bias, valid if has_valid else None, rule)
    assert_near(outcome(*arguments), expected_outcome(*arguments))


@pytest.mark.parametrize("parts", [("weights",), ("p",), ("z",), ("p", "z")], ids="+".join)
@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_each_output_has_its_gradient_alone(name, parts):
    rule, *size = CASES[name]
    arguments = (*problem(*size), rule)
    assert_near(outcome(*arguments, parts=parts), expected_outcome(*arguments, parts=parts))


@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_equal_scores_go_to_the_lower_id(score, has_bias):
    g = torch.Generator().manual_seed(3)
    logits = torch.randint(-1, 2, (40, 13), generator=g).float()
    logits[0] = -0.0
    logits[0, ::2] = 0.0
    bias = torch.full((13,), -2.0) if has_bias else None  # below zero floats order in reverse
    on_device = None if bias is None else bias.to(DEVICE)
    found = choose(logits.to(DEVICE), on_device, None, rule(5, score=score), False, "triton")
    expected = logits.sort(dim=1, descending=True, stable=True).indices[:, :5].int()
    assert torch.equal(found.experts_TK.cpu(), expected)


@pytest.mark.parametrize("group_best", [1, 2])
def test_equal_groups_go_to_the_lower_one(group_best):
    logits = torch.zeros(3, 12)
    logits[1, 6:9] = logits[1, 9:] = 1.0
    options = {"score": "sigmoid", "num_groups": 4, "top_groups": 1, "group_best": group_best}
    found = choose(logits.to(DEVICE), None, None, rule(3, **options), False, "triton")
    assert found.experts_TK.tolist() == [[0, 1, 2], [6, 7, 8], [0, 1, 2]]


@pytest.mark.parametrize("group_best, expected", [(1, [6, 7, 8]), (2, [3, 4, 5])])
def test_a_group_is_judged_by_the_sum_of_so_many_of_its_best(group_best, expected):
    logits = torch.zeros(1, 12)
    logits[0, 3:5], logits[0, 6] = 1.0, 1.4  # e + e > e^1.4 + 1
    options = {"num_groups": 4, "top_groups": 1, "group_best": group_best}
    found = choose(logits.to(DEVICE), None, None, rule(3, **options), False, "triton")
    assert found.experts_TK.tolist() == [expected]


def test_whatever_the_logits_each_row_chooses_distinct_experts():
    logits, _, _ = problem(24, 11, False)
    logits[0], logits[1, ::2], logits[2], logits[3, 4] = torch.nan, torch.nan, -torch.inf, torch.inf
    logits[4], logits[5, :9] = 1e38, -torch.inf
    for options in ({}, {"score": "sigmoid"}):
        made = choose(logits, None, None, rule(6, **options), True, "triton")
        for row in made.experts_TK.tolist():
            assert len(set(row)) == 6 and min(row) >= 0 and max(row) < 11
        assert int(made.counts_E.sum()) == 24 * 6


def test_weights_and_gradients_stay_finite_where_all_scores_vanish():
    logits = torch.full((3, 8), -200.0, device=DEVICE)
    found = outcome(logits, None, None, rule(2, score="sigmoid"))
    assert all(part.double().isfinite().all() for part in found)


def test_reads_nothing_beside_its_inputs():
    rule, *size = CASES["ragged_groups"]
    logits, bias, valid = problem(size[0], size[1], True)
    around = logits.new_full((logits.shape[0] + 130, logits.shape[1]), torch.nan)
    around[65:-65] = logits
    bias_around = bias.new_full((bias.numel() + 64,), torch.nan)
    bias_around[32:-32] = bias
    found = outcome(around[65:-65], bias_around[32:-32], valid, rule)
    assert_near(found, expected_outcome(logits, bias, valid, rule))
    by_column = logits.t().contiguous().t()
    assert_near(outcome(by_column, bias, valid, rule), expected_outcome(logits, bias, valid, rule))


def test_a_rows_bits_depend_on_no_other_row_nor_on_what_losses_want():
    rule, *size = CASES["deepseek"]
    logits, bias, _ = problem(*size)
    together = outcome(logits, bias, None, rule)
    for tokens in (slice(0, 1), slice(33, 64)):
        alone = choose(logits[tokens], bias, None, rule, False, "triton")
        assert alone.sums is None
        assert torch.equal(alone.experts_TK, together[0][tokens])
        assert torch.equal(alone.weights_TK, together[1][tokens])


@pytest.mark.parametrize("programs", [3, 10_000])
def test_counts_and_sums_are_whole_however_many_programs_share_the_rows(programs, monkeypatch):
    monkeypatch.setattr(router_kernels, "MAX_PROGRAMS", programs)
    monkeypatch.setattr(router_kernels, "MAX_ROWS", 4)
    monkeypatch.setattr(router_kernels, "FINISH_PARTS", 16)
    arguments = (*problem(90, 40, True), rule(3))
    assert_near(outcome(*arguments), expected_outcome(*arguments))


def test_saves_the_logits_and_the_ids_only():
    logits, _, _ = problem(37, 12, False)
    logits.requires_grad_()
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.__setitem__(t.data_ptr(), t.nbytes) or t, lambda t: t
    ):
        choose(logits, None, None, rule(3), True, "triton")
    assert sum(kept.values()) == 37 * 12 * 4 + 37 * 3 * 4


def test_compiling_changes_nothing():
    logits, bias, valid = problem(37, 12, True)
    logits.requires_grad_()

    def run(logits):
        made = choose(logits, bias, valid, rule(3), True, "triton")
        return made.weights_TK.square().sum() + (made.sums[0] * bias).sum() + made.sums[1]

    found = []
    for run_it in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        value = run_it(logits)
        found.append((value, *torch.autograd.grad(value, logits)))
    for plain, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-6, atol=1e-6)


def test_the_routers_fake_versions_and_schemas_say_the_truth():
    from moeyard.kernels.gpu.router_ops import route_backward_op, route_op

    logits, bias, valid = problem(37, 12, True)
    checks = ("test_schema", "test_faketensor")
    for wants_sums, mask in ((True, valid), (False, None)):
        forward = (logits, bias, mask, 3, True, True, 2.5, 4, 2, 1, wants_sums)
        torch.library.opcheck(route_op, forward, test_utils=checks)
        chosen, *_ = route_op(*forward)
        grads = (torch.ones(37, 3).to(logits), bias, bias[0].clone()) if wants_sums else (None,) * 3
        backward = (logits, chosen, mask, *grads, True, True, 2.5)
        torch.library.opcheck(route_backward_op, backward, test_utils=checks)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_the_top_k_router_computes_the_same_losses_and_gradients_on_both(score, monkeypatch):
    config = TopK(
        k=3, score=score, bias_update_rate=0.01, balance_loss=0.3, z_loss=0.1,
        sequence_balance_loss=0.2, num_groups=4, top_groups=3,
    )  # fmt: skip
    torch.manual_seed(0)
    gate = TopKRouter(config, 16, 12).to(DEVICE)
    gate.e_score_correction_bias += torch.linspace(-0.1, 0.1, 12).to(DEVICE)
    x = torch.randn(30, 16, device=DEVICE)
    valid = torch.arange(30, device=DEVICE) % 4 > 0
    found = []
    for is_chosen in (True, False):
        called = []
        monkeypatch.setattr(
            moeyard.kernels.router, "trusts_triton_router", lambda _, c=is_chosen: c
        )
        monkeypatch.setattr(
            moeyard.kernels.router,
            "choose_torch",
            lambda *a, called=called: called.append(1) or choose_torch(*a),
        )
        routing = gate.route(RouterInput(x, valid_T=valid, lengths=(11, 19)))
        assert bool(called) != is_chosen
        losses = auxiliary_losses([routing], [gate], reduce=lambda counts: counts)
        value = losses.total + routing.weights_TK.square().sum()
        grads = torch.autograd.grad(value, gate.weight)
        found.append((routing.experts_TK, routing.counts_E, losses.total.detach(), *grads))
    for triton_part, torch_part in zip(*found, strict=True):
        torch.testing.assert_close(triton_part, torch_part, rtol=1e-5, atol=1e-5)
