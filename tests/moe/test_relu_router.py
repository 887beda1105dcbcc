"""The ReLU router (ReMoE): positive logits are choices and weights; a controller keeps k."""

import pytest
import torch

import moeyard
from moeyard.moe.routers.loss_terms import GlobalCounts
from moeyard.moe.routers.losses import auxiliary_losses
from moeyard.moe.routers.relu import ReLU, ReLURouter
from moeyard.moe.routers.router import RouterSizes
from moeyard.moe.routers.routing import RouterInput

D, E = 7, 6


def router(**options) -> ReLURouter:
    torch.manual_seed(0)
    return ReLU(**options).build(RouterSizes(D, E)).double()


def rows(count=20) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, D, dtype=torch.float64, generator=generator)


def counts_of(routed: int, tokens: int) -> GlobalCounts:
    counts_E = torch.zeros(E, dtype=torch.int64)
    counts_E[1] = routed
    return GlobalCounts(counts_E, torch.tensor(tokens), {})


@pytest.mark.parametrize("training", [True, False])
def test_experts_with_a_positive_logit_are_chosen_with_it_as_weight(training):
    gate, x = router().train(training), rows()
    routing = gate.route(RouterInput(x))
    for token in range(len(x)):
        logits = [(x[token] @ weight_D).item() for weight_D in gate.weight]
        found = dict(
            zip(routing.experts_TK[token].tolist(), routing.weights_TK[token].tolist(), strict=True)
        )
        found.pop(-1, None)
        assert found == pytest.approx({e: logits[e] for e in range(E) if logits[e] > 0})


def test_a_token_without_positive_logits_adds_nothing():
    torch.manual_seed(0)
    layer = moeyard.MoELayer(D, 5, E, ReLU(), backend="reference").double()
    x = rows(6) * torch.tensor([[1, 1, 1, -1, 1, -1]], dtype=torch.float64).T
    with torch.no_grad():
        layer.gate.weight.copy_(-x[2].expand(E, D))
    y, routing = layer(x)
    assert (routing.experts_TK[2] == -1).all() and not y[2].any() and y.any()


def test_the_loss_is_l1_heavier_on_busy_experts_with_its_gradient():
    gate, x = router(k=2, l1=0.5), rows(9)
    routing = gate.route(RouterInput(x))
    found = auxiliary_losses([routing], [gate], lambda counts: counts).total
    logits = [[x_D @ weight_D for weight_D in gate.weight] for x_D in x]
    expected = 0
    for expert in range(E):
        positive = [row[expert] for row in logits if row[expert] > 0]
        expected = expected + 0.5 * E / (2 * 81) * len(positive) * sum(positive)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=0)  # the coefficient is fp32
    gradients = [torch.autograd.grad(value, gate.weight)[0] for value in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-12)


def test_the_coefficient_grows_while_choices_are_too_dense_over_all_layers_and_else_shrinks():
    gate = router(k=2)
    dense, sparse = counts_of(31, 10), counts_of(10, 10)
    for layers, factor in (
        ([dense, sparse], 1.2),  # 41 of 40: this layer and its neighbour together
        ([sparse, sparse], 1 / 1.2),
        ([counts_of(20, 10)], 1 / 1.2),  # exactly k
        ([dense], 1.2),
    ):
        before = float(gate.l1)
        gate.after_step(layers[0], layers)
        assert float(gate.l1) == pytest.approx(before * factor)


def test_the_controller_keeps_the_mean_near_k_and_its_state_is_saved():
    gate, x = router(k=1, l1=1e-3).float(), rows(200).float()
    x[:, 0] = 1.5  # a bias, so that few rows can be on an expert's side
    optimizer = torch.optim.Adam(gate.parameters(), 0.02)
    numbers = []
    for _ in range(150):
        routing = gate.route(RouterInput(x))
        loss = auxiliary_losses([routing], [gate], lambda counts: counts).total
        task = (routing.weights_TK.sum(dim=1) - 1).square().mean()  # wants weight to stay
        optimizer.zero_grad()
        (loss + task).backward()
        optimizer.step()
        counts = GlobalCounts(routing.counts_E, routing.num_tokens, {})
        gate.after_step(counts, [counts])
        numbers.append(int(routing.counts_E.sum()) / 200)
    assert numbers[0] > 2 and max(numbers[-60:]) > 1 > min(numbers[-60:])  # it swings around k
    assert sum(numbers[-60:]) / 60 == pytest.approx(1, abs=0.2)
    again = router(k=1, l1=1e-3).float()
    again.load_state_dict(gate.state_dict())
    assert again.l1 == gate.l1 != ReLU(l1=1e-3).l1


def test_shares_of_two_ranks_add_up_to_the_loss_of_one():
    gate, x = router(l1=0.5), rows(12)
    whole = auxiliary_losses([gate.route(RouterInput(x))], [gate], lambda c: c).total
    halves = [gate.route(RouterInput(part)) for part in x.split([5, 7])]
    packed = []
    for routing in halves:
        auxiliary_losses([routing], [gate], lambda counts: packed.append(counts) or counts)
    total = sum(auxiliary_losses([r], [gate], lambda _: sum(packed)).total for r in halves)
    torch.testing.assert_close(total, whole, rtol=1e-13, atol=0)
    gradients = [torch.autograd.grad(value, gate.weight)[0] for value in (total, whole)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-15)


def test_a_routing_of_evaluation_has_no_losses():
    gate = router().eval()
    with pytest.raises(moeyard.MoeyardError, match="call train"):
        auxiliary_losses([gate.route(RouterInput(rows()))], [gate], lambda counts: counts)
