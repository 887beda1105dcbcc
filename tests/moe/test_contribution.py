"""The contribution router: experts run where their predicted norm is large, with weights of 1.

T tokens, D model width, F width of the dense MLP, H width of the router, E experts.
"""

import pytest
import torch

import moeyard
from moeyard.kernels.trust import why_not_cpp
from moeyard.kernels.values.activation import gated
from moeyard.moe.gated_mlp import GatedMLP
from moeyard.moe.routers.contribution import Contribution, chosen, predicted_norms
from moeyard.moe.routers.router import RouterSizes
from moeyard.moe.routers.routing import RouterInput

D, F, E = 16, 24, 6
ALL_ON = [{"rule": "max", "tau": 0.0}, {"rule": "share", "tau": 1.0}]


def rows(count: int = 20, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(3)).to(dtype)


def cut(dense: GatedMLP, router: Contribution, backend: str = "auto") -> moeyard.MoELayer:
    """Return a layer whose expert e has neurons ``e * F / E`` and on."""
    layer = moeyard.MoELayer(D, F // E, E, router, dense.activation, backend=backend)
    weights = [dense.gate_proj.weight, dense.up_proj.weight]
    gate_up_EHD = torch.cat([w.detach().unflatten(0, (E, -1)) for w in weights], dim=1)
    layer.to(gate_up_EHD.dtype)
    layer.experts.fc1.data.copy_(gate_up_EHD)
    layer.experts.fc2.data.copy_(
        dense.down_proj.weight.detach().unflatten(1, (E, -1)).movedim(1, 0)
    )
    return layer.eval()


def test_the_prediction_is_a_small_mlp_without_biases_and_its_absolute_value():
    gate = Contribution(width=5).build(RouterSizes(D, E)).double()
    x_TD = rows(dtype=torch.float64)
    found = predicted_norms(x_TD, gate.hidden_HD, gate.norm_EH)
    for token in range(len(x_TD)):
        hidden = [max(0.0, float(w_D @ x_TD[token])) for w_D in gate.hidden_HD]
        for expert in range(E):
            weights = gate.norm_EH[expert].tolist()
            wanted = abs(sum(w * h for w, h in zip(weights, hidden, strict=True)))
            assert float(found[token, expert]) == pytest.approx(wanted)
    assert (found > 0).any()


def test_an_expert_runs_from_tau_times_the_largest_on():
    norms_TE = torch.tensor([[4.0, 1.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0], [1.0, 3.0, 2.9, 1.5]])
    for tau, wanted in (
        (0.0, [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]),
        (0.25, [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]]),
        (0.5, [[1, 0, 1, 0], [1, 1, 1, 1], [0, 1, 1, 1]]),
        (1.0, [[1, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 0]]),
    ):
        assert chosen(norms_TE, "max", tau).int().tolist() == wanted


def test_the_fewest_run_whose_share_reaches_tau():
    norms_TE = torch.tensor([[4.0, 1.0, 2.0, 1.0], [0.0, 0.0, 8.0, 0.0]])
    for tau, wanted in (
        (0.0, [[1, 0, 0, 0], [0, 0, 1, 0]]),
        (0.5, [[1, 0, 0, 0], [0, 0, 1, 0]]),
        (0.51, [[1, 0, 1, 0], [0, 0, 1, 0]]),
        (0.75, [[1, 0, 1, 0], [0, 0, 1, 0]]),
        (0.8, [[1, 1, 1, 0], [0, 0, 1, 0]]),  # ties go to the lower id
        (1.0, [[1, 1, 1, 1], [1, 1, 1, 1]]),
    ):
        assert chosen(norms_TE, "share", tau).int().tolist() == wanted


@pytest.mark.parametrize("rule", ["max", "share"])
def test_every_row_runs_one_expert_or_more_with_a_weight_of_exactly_one(rule):
    gate = Contribution(rule=rule, tau=0.6, width=7).build(RouterSizes(D, E)).eval()
    routing = gate.route(RouterInput(rows(200)))
    present_TK = routing.experts_TK >= 0
    counts_T = present_TK.sum(dim=1)
    assert counts_T.min() >= 1 and len(counts_T.unique()) > 2
    assert torch.equal(routing.weights_TK, present_TK.float())
    assert int(routing.counts_E.sum()) == int(counts_T.sum())


@pytest.mark.parametrize("all_on", ALL_ON, ids=["max", "share"])
@pytest.mark.parametrize("k", [1, 4, E])
@torch.no_grad()
def test_all_experts_together_are_the_dense_mlp_to_the_last_digits_of_fp64(all_on, k):
    torch.manual_seed(0)
    dense = GatedMLP(D, F).double()
    layer = cut(dense, Contribution(k=k, **all_on), backend="reference")
    x_TD = rows(dtype=torch.float64)
    wanted = dense(x_TD)
    assert (layer(x_TD)[0] - wanted).abs().max() <= 1e-12 * wanted.abs().max()


@pytest.mark.parametrize("all_on", ALL_ON, ids=["max", "share"])
@pytest.mark.parametrize("k", [1, 4, E])
@torch.no_grad()
def test_nothing_but_the_order_of_the_sum_differs_from_the_dense_mlp(all_on, k):
    """Small whole numbers add up without rounding in any order: then the bits are equal."""
    generator = torch.Generator().manual_seed(2)
    dense = GatedMLP(D, F, "reglu")
    for parameter in dense.parameters():
        parameter.copy_(torch.randint(-2, 3, parameter.shape, generator=generator))
    x_TD = torch.randint(-2, 3, (20, D), generator=generator).float()
    wanted = dense(x_TD)
    assert wanted.abs().max() > 100
    assert torch.equal(cut(dense, Contribution(k=k, **all_on))(x_TD)[0], wanted)


@pytest.mark.skipif(why_not_cpp(torch.device("cpu")) is not None, reason="needs the C++ kernels")
@torch.no_grad()
def test_the_bits_are_those_of_the_experts_outputs_added_in_the_order_of_their_ids():
    torch.manual_seed(0)
    layer = cut(GatedMLP(D, F), Contribution(k=E), backend="cpp")
    x_TD = rows()
    together_TD, routing = layer(x_TD)
    assert torch.equal(routing.experts_TK, torch.arange(E).int().expand(20, E))
    added_TD = torch.zeros_like(x_TD)
    for expert in range(E):
        alone = layer.gate.route_to(RouterInput(x_TD), torch.full((20, 1), expert).int())
        added_TD += layer(x_TD, routing=alone)[0]
    assert torch.equal(together_TD, added_TD)


@torch.no_grad()
def test_experts_that_do_not_run_add_nothing():
    torch.manual_seed(0)
    dense = GatedMLP(D, F).double()
    layer = cut(dense, Contribution(tau=0.7, width=9), backend="reference")
    x_TD = rows(dtype=torch.float64)
    y_TD, routing = layer(x_TD)
    assert 0 < int(routing.counts_E.sum()) < len(x_TD) * E
    mask_TE = torch.zeros(len(x_TD), E + 1, dtype=torch.float64)
    mask_TE.scatter_(1, routing.experts_TK.long() % (E + 1), 1)
    h_T2F = torch.cat([dense.gate_proj(x_TD), dense.up_proj(x_TD)], dim=1)
    kept_TF = gated(h_T2F, "swiglu") * mask_TE[:, :E].repeat_interleave(F // E, dim=1)
    torch.testing.assert_close(y_TD, dense.down_proj(kept_TF), rtol=1e-12, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_alone_and_in_a_batch(dtype):
    torch.manual_seed(0)
    layer = cut(GatedMLP(D, F).to(dtype), Contribution(tau=0.6, width=9, k=2))
    x_TD = rows(9, dtype)
    together_TD, routing = layer(x_TD)
    assert len((routing.experts_TK >= 0).sum(dim=1).unique()) > 2
    assert torch.equal(torch.cat([layer(x_1D)[0] for x_1D in x_TD.split(1)]), together_TD)


def test_first_matrices_are_the_same_everywhere_and_differ_by_layer():
    layers = [Contribution(width=3).build(RouterSizes(D, E, layer=n)) for n in (0, 0, 1)]
    assert torch.equal(layers[0].hidden_HD, layers[1].hidden_HD)
    assert not torch.equal(layers[0].norm_EH, layers[2].norm_EH)
    assert not list(layers[0].parameters())
