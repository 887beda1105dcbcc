"""The cosine router (X-MoE): scores are angles in a narrow space, over a temperature."""

import math

import pytest
import torch

import moeyard
from moeyard.moe.routers.cosine import Cosine, CosineRouter
from moeyard.moe.routers.losses import auxiliary_losses
from moeyard.moe.routers.router import RouterSizes
from moeyard.moe.routers.routing import RouterInput

D, E = 16, 6
OPTIONS = [
    {},
    {"learn_temperature": False, "k": 2},
    {"temperature": None, "normalize_token": False, "width": 4},
    {"temperature": None, "score": "sigmoid", "k": 3, "renormalize": True},
]


def router(**options) -> CosineRouter:
    torch.manual_seed(0)
    gate = Cosine(**options).build(RouterSizes(D, E)).double()
    with torch.no_grad():
        gate.directions_EP.mul_(torch.arange(1, E + 1).unsqueeze(1))
    return gate


def rows(count=15) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, D, dtype=torch.float64, generator=generator)


def scores_of(gate, x_D) -> list[torch.Tensor]:
    """One token's scores, from angles."""
    config = gate.config
    place_P = torch.stack([row_D @ x_D for row_D in gate.projection_PD])
    length = place_P.norm() if config.normalize_token else 1
    tau = 1 if config.temperature is None else config.temperature
    if gate.log_temperature is not None:
        tau = gate.log_temperature.exp()
    logits = [place_P @ d_P / (length * d_P.norm() * tau) for d_P in gate.directions_EP]
    if config.score == "sigmoid":
        return [1 / (1 + (-logit).exp()) for logit in logits]
    return [logit.exp() / sum(other.exp() for other in logits) for logit in logits]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_nearest_experts_win_with_all_gradients(options, training):
    gate, x = router(**options).train(training), rows()
    routing, expected = gate.route(RouterInput(x)), 0
    for token in range(len(x)):
        scores = scores_of(gate, x[token])
        chosen = sorted(range(E), key=lambda e, s=scores: -s[e].item())[: gate.k]
        assert routing.experts_TK[token].tolist() == chosen
        total = sum(scores[e] for e in chosen) if gate.config.renormalize else 1
        weights = torch.stack([scores[e] / total for e in chosen])
        torch.testing.assert_close(routing.weights_TK[token], weights, rtol=1e-6, atol=1e-9)
        expected = expected + (weights**3).sum()
    found = (routing.weights_TK**3).sum()
    parameters = list(gate.parameters())
    assert len(parameters) == 2 + (options.get("temperature", 0) is not None) * (
        options.get("learn_temperature", True)
    )
    for parameter in parameters:
        gradients = [
            torch.autograd.grad(value, parameter, retain_graph=True)[0]
            for value in (found, expected)
        ]
        assert gradients[1].abs().max() > 0
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-8)


def test_lengths_of_tokens_and_of_directions_change_nothing():
    gate, x = router(), rows()
    before = gate.logits(x)
    with torch.no_grad():
        gate.directions_EP.mul_(torch.rand(E, 1, dtype=torch.float64) + 0.5)
    torch.testing.assert_close(gate.logits(3 * x), before)
    other = router(normalize_token=False)
    torch.testing.assert_close(other.logits(3 * x), 3 * other.logits(x))


def test_logits_stay_within_the_inverse_temperature_which_cannot_become_too_small():
    gate, x = router(), rows(200)
    assert 10 < gate.logits(x).abs().max() <= 1 / 0.07 + 1e-5
    with torch.no_grad():
        gate.log_temperature.fill_(-50)
    assert 50 < gate.logits(x).abs().max() <= 100 + 1e-9


def test_no_forward_changes_a_weight():
    for training in (True, False):
        gate = router().train(training)
        before = {name: tensor.clone() for name, tensor in gate.state_dict().items()}
        gate.route(RouterInput(rows()))
        assert all(torch.equal(before[name], t) for name, t in gate.state_dict().items())


def test_a_row_is_routed_alike_alone_and_in_a_batch_to_the_bit():
    gate, x = router(k=2).float().eval(), rows(40).float()
    with torch.no_grad():
        whole = gate.route(RouterInput(x)).weights_TK
        alone = torch.cat([gate.route(RouterInput(row)).weights_TK for row in x.split(1)])
    assert torch.equal(whole, alone)


def test_first_directions_are_orthogonal_and_the_temperature_is_the_configured_one():
    gate = router(temperature=0.2)
    first_EP = gate.initialize("directions_EP", torch.Generator().manual_seed(1))
    assert torch.equal(first_EP, gate.initialize("directions_EP", torch.Generator().manual_seed(1)))
    torch.testing.assert_close(first_EP.T @ first_EP, torch.eye(E // 2))
    first = gate.initialize("log_temperature", torch.Generator())
    assert float(first) == pytest.approx(math.log(0.2))
    assert gate.initialize("projection_PD", torch.Generator()) is None


def test_shares_of_two_ranks_add_up_to_the_loss_of_one():
    gate, x = router(balance_loss=0.7, z_loss=0.1), rows(12)
    whole = auxiliary_losses([gate.route(RouterInput(x))], [gate], lambda c: c).total
    halves = [gate.route(RouterInput(part)) for part in x.split([5, 7])]
    packed = []
    for routing in halves:
        auxiliary_losses([routing], [gate], lambda counts: packed.append(counts) or counts)
    total = sum(auxiliary_losses([r], [gate], lambda _: sum(packed)).total for r in halves)
    torch.testing.assert_close(total, whole, rtol=1e-13, atol=0)


def test_where_a_learned_temperature_begins_is_not_architecture():
    assert Cosine(temperature=0.1).architecture() == Cosine(temperature=0.2).architecture()
    fixed = [Cosine(temperature=t, learn_temperature=False).architecture() for t in (0.1, 0.2)]
    assert fixed[0] != fixed[1]
    with pytest.raises(moeyard.MoeyardError, match=r"temperature: it is 0"):
        moeyard.router("cosine", temperature=0)
