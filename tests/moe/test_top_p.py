"""The top-p router: the fewest experts whose probabilities exceed p together."""

import pytest
import torch

import moeyard
from moeyard.moe.routers.losses import auxiliary_losses
from moeyard.moe.routers.router import RouterSizes
from moeyard.moe.routers.routing import RouterInput
from moeyard.moe.routers.top_p import TopP, TopPRouter

D, E = 7, 6


def router(**options) -> TopPRouter:
    torch.manual_seed(0)
    return TopP(**options).build(RouterSizes(D, E)).double()


def rows(count=30) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, D, dtype=torch.float64, generator=generator)


def probabilities(x_D, weight_ED) -> list[torch.Tensor]:
    exponentials = [(x_D @ weight_D).exp() for weight_D in weight_ED]
    return [value / sum(exponentials) for value in exponentials]


def fewest(scores, p, max_k=None) -> list[int]:
    chosen, total = [], 0.0
    for expert in sorted(range(E), key=lambda e: -scores[e].item()):
        if total > p or len(chosen) == max_k:
            break
        chosen.append(expert)
        total += scores[expert].item()
    return chosen


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("p", "max_k"), [(0.4, None), (0.8, None), (0.8, 2), (0.4, 1)])
def test_a_token_visits_the_fewest_experts_that_exceed_p_with_their_probabilities(
    p, max_k, training
):
    gate, x = router(p=p, max_k=max_k).train(training), rows()
    routing, numbers = gate.route(RouterInput(x)), set()
    for token in range(len(x)):
        scores = probabilities(x[token], gate.weight)
        chosen = fewest(scores, p, max_k)
        rest = [-1] * (routing.experts_TK.shape[1] - len(chosen))
        assert routing.experts_TK[token].tolist() == chosen + rest
        expected = torch.stack([scores[e] for e in chosen])
        torch.testing.assert_close(routing.weights_TK[token, : len(chosen)], expected)
        numbers.add(len(chosen))
    assert len(numbers) > 1 or max_k is not None
    assert int(routing.counts_E.sum()) == int((routing.experts_TK >= 0).sum())


def test_the_bounds_are_top_1_and_all_experts():
    assert (router(p=0).route(RouterInput(rows())).experts_TK[:, 1:] == -1).all()
    gate = router(p=1)
    with torch.no_grad():
        gate.weight.zero_()  # six times 1/6 is exactly 1 or a little less, and never more
    assert (gate.route(RouterInput(rows())).counts_E == 30).all()


def test_equal_probabilities_go_to_the_lower_id_until_p_is_exceeded():
    gate = router(p=0.5)
    with torch.no_grad():
        gate.weight.zero_()
        gate.weight[4:] -= 1e6  # leaves four probabilities of exactly 1/4
    routing = gate.route(RouterInput(torch.ones(2, D, dtype=torch.float64)))
    assert routing.experts_TK[:, :4].tolist() == [[0, 1, 2, -1]] * 2


@pytest.mark.parametrize("sharpness", [0.0, 1.0, 4.0])
def test_a_row_of_many_experts_chooses_the_same_alone_and_among_others(sharpness):
    torch.manual_seed(0)
    gate = TopP(p=0.51).build(RouterSizes(D, 40)).eval()  # fp32; row 0 wants half of the experts
    x = rows(12).float() * torch.tensor([0.0, *[sharpness] * 11]).unsqueeze(1)
    scores = gate.logits(x).softmax(dim=-1)
    together = gate.route(RouterInput(x)).experts_TK
    for token in range(len(x)):
        chosen, total = [], torch.zeros(())
        for expert in scores[token].sort(descending=True, stable=True).indices.tolist():
            if total <= 0.51:
                chosen.append(expert)
                total = total + scores[token, expert]
        alone = gate.route(RouterInput(x[token : token + 1])).experts_TK[0]
        for found in (alone, together[token]):
            assert found[found >= 0].tolist() == chosen


def test_losses_follow_their_formulas_with_gradients():
    gate, x = router(k=2, entropy_loss=0.3, balance_loss=0.5, z_loss=0.1), rows(9)
    routing = gate.route(RouterInput(x))
    found = auxiliary_losses([routing], [gate], lambda counts: counts).total
    scores = [probabilities(x_D, gate.weight) for x_D in x]
    entropy = -sum(s * s.log() for row in scores for s in row) / 9
    counts = [sum(e in fewest(row, 0.4) for row in scores) for e in range(E)]
    sums = [sum(row[e] for row in scores) for e in range(E)]
    balance = E / (2 * 81) * sum(n * s for n, s in zip(counts, sums, strict=True))
    z = sum(sum((x_D @ w).exp() for w in gate.weight).log() ** 2 for x_D in x) / 9
    expected = 0.3 * entropy + 0.5 * balance + 0.1 * z
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(value, gate.weight)[0] for value in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-13)


def test_the_weights_carry_the_gradient_of_chosen_experts():
    gate, x = router(p=0.6), rows(5).requires_grad_()
    routing = gate.route(RouterInput(x))
    chosen = [probabilities(x_D, gate.weight) for x_D in x]
    expected = sum(row[e] ** 2 for row in chosen for e in fewest(row, 0.6))
    found = routing.weights_TK.square().sum()
    for leaf in (gate.weight, x):
        gradients = [torch.autograd.grad(v, leaf, retain_graph=True)[0] for v in (found, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-13)


def test_shares_of_two_ranks_add_up_to_the_loss_of_one():
    gate, x = router(entropy_loss=0.3, z_loss=0.1), rows(12)
    whole = auxiliary_losses([gate.route(RouterInput(x))], [gate], lambda c: c).total
    halves = [gate.route(RouterInput(part)) for part in x.split([5, 7])]
    packed = []
    for routing in halves:
        auxiliary_losses([routing], [gate], lambda counts: packed.append(counts) or counts)
    total = sum(auxiliary_losses([r], [gate], lambda _: sum(packed)).total for r in halves)
    torch.testing.assert_close(total, whole, rtol=1e-13, atol=0)


def test_the_rule_is_tensor_operations_only():
    gate, x = router(p=0.6).eval(), rows()

    def experts(x_TD):
        return gate.route(RouterInput(x_TD)).experts_TK

    compiled = torch.compile(experts, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), experts(x))


def test_a_layer_computes_all_choices_of_a_token():
    torch.manual_seed(0)
    layer = moeyard.MoELayer(D, 5, E, TopP(k=1, p=0.9), backend="reference").double()
    x = rows(8)
    y, routing = layer(x)
    assert int(routing.counts_E.sum()) > 8 * 2
    alone = moeyard.MoELayer(D, 5, E, moeyard.TopK(k=E, renormalize=False), backend="reference")
    alone = alone.double()
    alone.load_state_dict(layer.state_dict())
    _, full = alone(x)
    ids_TK = full.experts_TK.clone()
    for token in range(8):
        chosen = set(routing.experts_TK[token].tolist())
        ids_TK[token, [expert not in chosen for expert in ids_TK[token].tolist()]] = -1
    full.experts_TK = ids_TK
    torch.testing.assert_close(y, alone(x, routing=full)[0])
