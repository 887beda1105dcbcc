"""Cases of the Triton kernels against the reference in fp64; they run twice.

In Triton's interpreter, in a separate process (test_triton_interpreted.py), and on a GPU
(test_triton_gpu.py).
"""

import pytest
import torch
import triton
from torch.utils.checkpoint import checkpoint

from moeyard.kernels.experts import expert_mlp
from moeyard.kernels.gpu.grouping import group_rows
from moeyard.kernels.values.activation import fc1_rows
from moeyard.kernels.values.expert_weights import ExpertWeights
from moeyard.kernels.values.grouping import group_tokens
from moeyard.kernels.values.main_grads import MainGrads

DEVICE = "cpu" if triton.knobs.runtime.interpret else "cuda"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
NAMES = ("y", "grad x", "grad weights", "grad fc1", "grad fc2", "grad bias1", "grad bias2")

# T, K, E, D, F; together they use every tile size, with and without a ragged end.
SHAPES = {
    "no_token": (0, 2, 3, 8, 8),
    "one_token": (1, 1, 1, 16, 16),
    "every_expert": (5, 3, 3, 24, 40),
    "tiles_of_16": (21, 2, 6, 128, 72),
    "tiles_of_32": (25, 2, 5, 24, 40),
    "tiles_of_64": (57, 2, 3, 40, 24),
    "tiles_of_128": (131, 2, 2, 68, 136),
}


def routing(kind, tokens, choices, experts, seed=0):
    g = torch.Generator().manual_seed(seed)
    if kind == "one_expert_takes_all":
        return torch.full((tokens, choices), experts - 1)
    if kind == "nobody":
        return torch.full((tokens, choices), -1)
    ids = torch.randint(-1 if kind == "with_none" else 0, experts, (tokens, choices), generator=g)
    if kind == "an_expert_is_idle":
        ids = torch.where(ids == 0, experts - 1, ids)
    return ids


def problem(shape, dtype, seed=0, has_bias=False, activation="swiglu"):
    tokens, choices, experts, d_model, d_expert = shape
    d_hidden = fc1_rows(d_expert, activation)
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, d_model, generator=g)
    fc1 = torch.randn(experts, d_hidden, d_model, generator=g) * d_model**-0.5
    fc2 = torch.randn(experts, d_model, d_expert, generator=g) * d_expert**-0.5
    weights = torch.rand(tokens, choices, generator=g)
    leaves = [x.to(dtype), weights, fc1.to(dtype), fc2.to(dtype)]
    if has_bias:
        widths = (d_hidden, d_model)
        leaves += (torch.randn(experts, width, generator=g).to(dtype) for width in widths)
    return [leaf.to(DEVICE).requires_grad_() for leaf in leaves]


def outcome(
    ids,
    leaves,
    backend="triton",
    table=None,
    activation="swiglu",
    main_grads=None,
    recompute=False,
    most_choices=None,
):
    """Return y and all gradients of a fixed weighted sum of it."""
    x, weights, fc1, fc2, *biases = leaves
    experts = ExpertWeights.of(
        (fc1, fc2, *biases), slot_of_E=table, activation=activation, main_grads=main_grads
    )
    how = {"recompute": recompute, "most_choices": most_choices}
    y = expert_mlp(x, ids.to(x.device), weights, experts, backend, **how)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y)
    wanted = leaves[:2] if main_grads else leaves
    return [y.detach(), *torch.autograd.grad(y, wanted, upstream)]


def expected_outcome(ids, leaves, **more):
    exact = [leaf.detach().double().cpu().requires_grad_() for leaf in leaves]
    return outcome(ids, exact, "reference", **more)


def assert_near(found, expected, dtype):
    for name, (actual, wanted) in zip(NAMES, zip(found, expected, strict=True), strict=False):
        assert actual.shape == wanted.shape, name
        if wanted.numel():
            error = (actual.double().cpu() - wanted).abs().max() / max(1.0, wanted.abs().max())
            assert error <= TOLERANCE[dtype], f"{name} is off by {float(error):.1e}"


# The interpreter is slow, and types differ in rounding only: each tile size in fp32 and bf16, and
# fp16 once. On a GPU, test_triton_gpu.py takes all types at real widths.
CASES = [
    *((torch.float32, name) for name in SHAPES),
    *((torch.bfloat16, f"tiles_of_{rows}") for rows in (16, 32, 64, 128)),
    (torch.float16, "tiles_of_128"),
]


@pytest.mark.parametrize(("dtype", "name"), CASES, ids=str)
def test_agrees_with_the_reference_in_values_and_all_gradients(dtype, name):
    shape = SHAPES[name]
    ids, leaves = routing("with_none", *shape[:3]), problem(shape, dtype)
    assert_near(outcome(ids, leaves), expected_outcome(ids, leaves), dtype)


BIASED = [
    (torch.float32, "no_token"),
    (torch.float32, "one_token"),
    (torch.bfloat16, "every_expert"),
]
BIASED += [(torch.float32, "tiles_of_16"), (torch.float16, "tiles_of_128")]


@pytest.mark.parametrize(("dtype", "name"), BIASED, ids=str)
def test_biases_agree_with_the_reference_in_values_and_all_gradients(dtype, name):
    shape = SHAPES[name]
    ids, leaves = routing("with_none", *shape[:3]), problem(shape, dtype, has_bias=True)
    assert_near(outcome(ids, leaves), expected_outcome(ids, leaves), dtype)


@pytest.mark.parametrize("kind", ["one_expert_takes_all", "nobody", "an_expert_is_idle"])
def test_any_distribution_of_the_rows_agrees_with_the_reference(kind):
    shape = (37, 2, 5, 24, 40)
    ids, leaves = routing(kind, *shape[:3]), problem(shape, torch.float32, has_bias=True)
    assert_near(outcome(ids, leaves), expected_outcome(ids, leaves), torch.float32)


@pytest.mark.parametrize("activation", ["reglu", "geglu", "clamped_swiglu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_activations_agree_with_the_reference(activation, dtype):
    shape = SHAPES["tiles_of_32"]
    ids, leaves = routing("random", *shape[:3]), problem(shape, dtype)
    if dtype == torch.float32:  # beyond the limit where gates are clamped; bf16 may round across it
        leaves[2] = (leaves[2].detach() * 8).requires_grad_()
    found = outcome(ids, leaves, activation=activation)
    assert_near(found, expected_outcome(ids, leaves, activation=activation), dtype)


@pytest.mark.parametrize(
    ("activation", "name", "recompute"),
    [("relu", "tiles_of_16", False), ("gelu", "tiles_of_32", True)],
)
def test_experts_without_a_gate_agree_with_the_reference(activation, name, recompute):
    shape = SHAPES[name]
    ids = routing("with_none", *shape[:3])
    leaves = problem(shape, torch.float32, has_bias=recompute, activation=activation)
    found = outcome(ids, leaves, activation=activation, recompute=recompute)
    expected = expected_outcome(ids, leaves, activation=activation)
    assert_near(found, expected, torch.float32)


@pytest.mark.parametrize("table", [(1, -1, 0, 2, -1, -1), (-1, -1, 0, 1, 2, -1)], ids=str)
def test_a_slot_table_agrees_with_the_reference_and_drops_experts_that_are_not_here(table):
    ids = routing("with_none", 23, 2, 6)
    leaves = problem((23, 2, 3, 24, 40), torch.float32, has_bias=True)
    here = torch.tensor([e for e, slot in enumerate(table) if slot >= 0])
    expected_ids = torch.where(torch.isin(ids, here), ids, -1)
    found = outcome(ids, leaves, table=table)
    assert_near(found, expected_outcome(expected_ids, leaves, table=table), torch.float32)


def test_ids_out_of_range_are_rows_without_an_expert():
    shape = (37, 2, 5, 24, 40)
    ids, leaves = routing("random", *shape[:3]), problem(shape, torch.float32)
    wrong = ids.clone()
    wrong[::3, 0] = torch.tensor([5, -7, 2**31 - 1, 2**40, -(2**40)]).repeat(3)[:13]
    expected = expected_outcome(torch.where(wrong == ids, ids, -1), leaves)
    assert_near(outcome(wrong, leaves), expected, torch.float32)


def test_reads_nothing_beside_its_inputs():
    """Other rows, slots and columns, and the routing weights of no expert, are NaN."""
    shape = (37, 2, 5, 24, 40)
    ids, leaves = routing("with_none", *shape[:3]), problem(shape, torch.float32, has_bias=True)

    def surrounded(leaf):
        around = leaf.new_full((leaf.shape[0] + 2, leaf[0].numel() + 64), torch.nan)
        inside = around[1:-1, : leaf[0].numel()]
        inside.copy_(leaf.detach().flatten(1))
        strides = (around.stride(0), *leaf.stride()[1:])
        view = around.as_strided(leaf.shape, strides, inside.storage_offset())
        return view.detach().requires_grad_()

    x, weights, *parameters = leaves
    rows = x.new_full((x.shape[0] + 300, x.shape[1]), torch.nan)
    rows[100 : 100 + x.shape[0]] = x.detach()
    x_inside = rows[100 : 100 + x.shape[0]].detach().requires_grad_()
    nan_weights = torch.where(ids.to(DEVICE) >= 0, weights.detach(), torch.nan).requires_grad_()
    found = outcome(ids, [x_inside, nan_weights, *map(surrounded, parameters)])
    assert_near(found, expected_outcome(ids, leaves), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("is_empty", [False, True], ids=["filled", "empty"])
def test_backward_adds_to_fp32_main_gradients(dtype, is_empty):
    shape = (37, 2, 5, 24, 40)
    ids, leaves = routing("an_expert_is_idle", *shape[:3]), problem(shape, dtype, has_bias=is_empty)
    fill = float("nan") if is_empty else 1.0  # the contents of an empty sum must not matter
    totals = [torch.full(leaf.shape, fill, device=DEVICE) for leaf in leaves[2:]]
    sums = MainGrads.of(totals, is_empty=is_empty)
    for _ in range(2):
        found = outcome(ids, leaves, main_grads=sums)
    expected = expected_outcome(ids, leaves)
    expected[3:] = [2 * grad + (0 if is_empty else 1) for grad in expected[3:]]
    assert_near([*found, *totals], expected, dtype)


def test_takes_expanded_gradients_and_inputs_that_are_not_contiguous():
    shape = (37, 2, 5, 24, 40)
    ids, (x, weights, fc1, fc2) = routing("random", *shape[:3]), problem(shape, torch.float32)
    found = []
    for backend in ("triton", "reference"):
        by_column = x.detach().t().contiguous().t().requires_grad_()
        by_choice = weights.detach().t().contiguous().t().requires_grad_()
        leaves = (by_column, by_choice, fc1, fc2)
        y = expert_mlp(by_column, ids.to(DEVICE), by_choice, ExpertWeights(fc1, fc2), backend)
        found.append([y.detach(), *torch.autograd.grad(y.sum(), leaves)])
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_inference_gives_the_bits_of_training_and_every_run_the_same_bits():
    shape = SHAPES["tiles_of_64"]
    ids, leaves = routing("with_none", *shape[:3]), problem(shape, torch.bfloat16, has_bias=True)
    first, second = outcome(ids, leaves), outcome(ids, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with torch.no_grad():
        fc1, fc2, *biases = leaves[2:]
        experts = ExpertWeights.of((fc1, fc2, *biases))
        y = expert_mlp(leaves[0], ids.to(DEVICE), leaves[1], experts, "triton")
    assert torch.equal(y, first[0])


def test_saves_x_the_pre_activations_and_indices_only():
    tokens, choices, _, d_model, d_expert = shape = (37, 2, 5, 24, 40)
    ids, leaves = routing("random", *shape[:3]), problem(shape, torch.bfloat16)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.__setitem__(t.data_ptr(), t.nbytes) or t, lambda t: t
    ):
        expert_mlp(leaves[0], ids.to(DEVICE), leaves[1], ExpertWeights(*leaves[2:]), "triton")
    parameters = {leaf.data_ptr() for leaf in leaves[1:]}
    saved = sum(size for pointer, size in kept.items() if pointer not in parameters)
    rows = tokens * choices
    indices = 4 * (2 * rows + 5 + 1 + 2 * (5 + (rows - 5) // 32))
    assert saved == 2 * tokens * d_model + 4 * rows * d_expert + indices


def test_checkpointing_and_compiling_change_nothing():
    shape = (37, 2, 5, 24, 40)
    ids, leaves = routing("random", *shape[:3]).to(DEVICE), problem(shape, torch.float32)
    leaves += problem(shape, torch.float32, has_bias=True)[4:]

    def run(x, weights, fc1, fc2, *biases):
        experts = ExpertWeights.of((fc1, fc2, *biases))
        return expert_mlp(x, ids, weights, experts, "triton") * 2

    plain = run(*leaves)
    expected = [plain, *torch.autograd.grad(plain.square().sum(), leaves)]
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for other in (lambda *a: checkpoint(run, *a, use_reentrant=False), compiled):
        y = other(*leaves)
        found = [y, *torch.autograd.grad(y.square().sum(), leaves)]
        for actual, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=1e-6)


GROUPINGS = {
    "random": (131, 3, 7),
    "no_token": (0, 2, 7),
    "one_token": (1, 2, 7),
    "one_expert": (70, 2, 1),
    "few_rows": (40, 3, 7),
    "as_many_rows_as_one_program_takes": (64, 2, 70),
    "more_slots_than_a_line": (65, 4, 70),
    "more_blocks_than_a_scan_takes": (4200, 2, 3),
}


@pytest.mark.parametrize("size", GROUPINGS.values(), ids=GROUPINGS.keys())
@pytest.mark.parametrize("kind", ["with_none", "one_expert_takes_all", "nobody"])
def test_groups_rows_as_the_reference_does_and_cuts_groups_into_tiles(size, kind):
    ids, num_slots, tile_rows = routing(kind, *size), size[2], 16
    found = group_rows(ids.to(DEVICE), None, num_slots, tile_rows)
    expected = group_tokens(ids, num_slots)
    assert torch.equal(found.order_R.cpu().long(), expected.order_R)
    assert torch.equal(found.inverse_R.cpu().long(), expected.inverse_R)
    assert torch.equal(found.offsets_S1.cpu(), expected.offsets_E1)
    bounds = expected.offsets_E1.tolist()
    tiles = [
        [slot, first]
        for slot in range(num_slots)
        for first in range(bounds[slot], bounds[slot + 1], tile_rows)
    ]
    assert found.tiles_L2[: len(tiles)].tolist() == tiles
    assert all(slot == -1 for slot in found.tiles_L2[len(tiles) :, 0].tolist())


@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "biased"])
def test_fake_versions_and_schemas_say_the_truth(has_bias):
    from moeyard.kernels.gpu import ops

    shape = (37, 2, 5, 24, 40)
    ids = routing("with_none", *shape[:3]).to(DEVICE)
    leaves = problem(shape, torch.float32, has_bias=has_bias)
    x, weights, fc1, fc2, *biases = (leaf.detach() for leaf in leaves)
    biases = biases or [None, None]
    table = torch.arange(5, dtype=torch.int32, device=DEVICE)
    checks = ("test_schema", "test_faketensor")
    main, most_rows = (None,) * 4, int((ids >= 0).sum())
    forward = (x, ids, weights, fc1, fc2, *biases, table, *main, "swiglu", True, most_rows)
    torch.library.opcheck(ops.expert_mlp_op, forward, test_utils=checks)
    saved = ops.expert_mlp_op(*forward)[1:]
    sums = [None if part is None else torch.zeros_like(part) for part in (fc1, fc2, *biases)]
    for wants_x, add, outs in ((True, True, sums), (False, False, (None, *sums[1:3], None))):
        rows = (x, x, weights, *saved, fc1, fc2, *biases)
        backward = (*rows, 5, most_rows, "swiglu", wants_x, add, *outs)
        torch.library.opcheck(ops.expert_mlp_backward_op, backward, test_utils=checks)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["tiles_of_16", "tiles_of_64"])
def test_rows_that_come_from_other_ranks_need_room_for_their_experts_here_only(name, recompute):
    shape = SHAPES[name]
    ids, leaves = routing("random", *shape[:3]), problem(shape, torch.float32, has_bias=True)
    ids[torch.rand(ids.shape, generator=torch.Generator().manual_seed(4)) < 0.8] = -1
    here, kept = int((ids >= 0).sum()), {}
    assert 0 < here < ids.numel() // 2
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.__setitem__(t.data_ptr(), tuple(t.shape)) or t, lambda t: t
    ):
        found = outcome(ids, leaves, recompute=recompute, most_choices=here)
    assert_near(found, expected_outcome(ids, leaves), torch.float32)
    assert ((here, 2 * shape[4]) in kept.values()) == (not recompute)
    with pytest.raises(RuntimeError, match="most_choices is too low"):
        outcome(ids, leaves, most_choices=here - 1)


@pytest.mark.parametrize("recompute", [False, True])
def test_no_row_needs_no_room(recompute):
    shape = SHAPES["tiles_of_16"]
    ids, leaves = routing("nobody", *shape[:3]), problem(shape, torch.float32, has_bias=True)
    found = outcome(ids, leaves, recompute=recompute, most_choices=0)
    assert_near(found, expected_outcome(ids, leaves), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [0, 37])
def test_computing_fc1_again_changes_no_bit_and_keeps_x_only(tokens, dtype):
    shape = (tokens, 2, 5, 24, 40)
    ids = routing("with_none", *shape[:3]).to(DEVICE)
    leaves = problem(shape, dtype, has_bias=True)
    x, weights, fc1, fc2, *biases = leaves
    found, saved = [], []
    for recompute in (False, True):
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: kept.__setitem__(t.data_ptr(), t.nbytes) or t, lambda t: t
        ):
            experts = ExpertWeights.of((fc1, fc2, *biases))
            y = expert_mlp(x, ids, weights, experts, "triton", recompute=recompute)
        upstream = torch.cos(torch.arange(y.numel(), device=DEVICE)).view_as(y).to(y)
        found.append([y, *torch.autograd.grad(y, leaves, upstream)])
        saved.append(sum(kept.values()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert saved[0] - saved[1] == tokens * 2 * 2 * 40 * dtype.itemsize
