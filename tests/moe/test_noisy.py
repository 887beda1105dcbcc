"""The routers that draw: Shazeer's noise and losses, V-MoE's, GShard's second expert, Switch."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

import moeyard
from moeyard.moe.routers.losses import auxiliary_losses
from moeyard.moe.routers.noisy import JITTER, NOISE, SECOND, Noisy, NoisyRouter
from moeyard.moe.routers.router import RouterSizes
from moeyard.moe.routers.routing import RouterInput

D, E = 6, 5
PLAIN = {"noise": "none", "importance_loss": 0.0, "load_loss": 0.0}
VMOE = {"noise": "constant", "noise_std": 2.0, "renormalize": False}


def router(**options) -> NoisyRouter:
    torch.manual_seed(0)
    gate = Noisy(**options).build(RouterSizes(D, E, layer=2)).double()
    with torch.no_grad():
        gate.weight.mul_(2)
        if gate.noise_weight is not None:
            gate.noise_weight.normal_()
    return gate


def rows(lengths=(7, 4), valid_T=None) -> RouterInput:
    total = sum(lengths)
    x_TD = torch.randn(
        total, D, dtype=torch.float64, generator=torch.Generator().manual_seed(total)
    )
    keys = tuple(range(10, 10 + len(lengths)))
    return RouterInput(x_TD, lengths=lengths, draw_keys=keys, valid_T=valid_T)


def phi(value):
    return 0.5 * (1 + torch.erf(value / math.sqrt(2)))


def logits_by_hand(gate, given) -> tuple[list, list, list]:
    """Return clean logits, noisy logits and standard deviations, a number at a time."""
    drawn = gate._draw(given, NOISE, torch.randn, torch.empty(len(given.x_TD), E).double())
    clean, noisy, stds = [], [], []
    for token, x_D in enumerate(given.x_TD):
        clean.append([x_D @ gate.weight[e] for e in range(E)])
        if gate.noise_weight is None:
            stds.append([torch.tensor(gate.config.noise_std / E).double()] * E)
        else:
            raw = [x_D @ gate.noise_weight[e] for e in range(E)]
            stds.append([torch.log1p(value.exp()) + 0.01 for value in raw])
        noisy.append([c + n * s for c, n, s in zip(clean[-1], drawn[token], stds[-1], strict=True)])
    return clean, noisy, stds


def softmax(values) -> list:
    exponentials = [value.exp() for value in values]
    return [value / sum(exponentials) for value in exponentials]


def best(values, k) -> list[int]:
    return sorted(range(E), key=lambda e: -values[e].item())[:k]


def variation(sums) -> torch.Tensor:
    mean = sum(sums) / E
    return sum((value - mean) ** 2 for value in sums) / (E - 1) / (mean**2 + 1e-10)


@pytest.mark.parametrize("options", [{"k": 2}, {"k": 1}, {"k": 2} | VMOE], ids=str)
def test_training_chooses_by_noisy_scores_and_evaluation_by_clean_ones(options):
    gate, given = router(**options), rows()
    clean, noisy, _ = logits_by_hand(gate, given)
    for logits, routing in (
        (noisy, gate.train().route(given)),
        (clean, gate.eval().route(given)),
    ):
        for token, values in enumerate(logits):
            chosen, scores = best(values, gate.k), softmax(values)
            assert routing.experts_TK[token].tolist() == chosen
            total = sum(scores[e] for e in chosen) if gate.config.renormalize else 1
            expected = torch.stack([scores[e] / total for e in chosen])
            torch.testing.assert_close(routing.weights_TK[token], expected)
    differs = [best(a, gate.k) != best(b, gate.k) for a, b in zip(clean, noisy, strict=True)]
    assert any(differs)


def importance_and_load(gate, given) -> tuple[list, list]:
    """The sums of Shazeer et al. eq. 6 and 8-10, or V-MoE's, by loops."""
    importance, load = [0.0] * E, [0.0] * E
    for clean, noisy, std in zip(*logits_by_hand(gate, given), strict=True):
        chosen = best(noisy, gate.k)
        if gate.noise_weight is None:
            weights = dict(enumerate(softmax(clean)))
        else:
            weights = dict(zip(chosen, softmax([noisy[e] for e in chosen]), strict=True))
        for e in range(E):
            importance[e] = importance[e] + weights.get(e, 0.0)
            if gate.noise_weight is None:
                rival = noisy[chosen[-1]]
            else:
                others = sorted((noisy[o] for o in range(E) if o != e), key=lambda v: -v.item())
                rival = others[gate.k - 1]
            load[e] = load[e] + phi((clean[e] - rival) / std[e])
    return importance, load


@pytest.mark.parametrize("options", [{"k": 2}, {"k": 1}, {"k": 2} | VMOE], ids=str)
def test_the_losses_are_the_variations_of_importance_and_load_with_all_gradients(options):
    gate, given = router(importance_loss=0.5, load_loss=0.25, **options), rows()
    total = auxiliary_losses([gate.route(given)], [gate], lambda counts: counts).total
    importance, load = importance_and_load(gate, given)
    expected = 0.5 * variation(importance) + 0.25 * variation(load)
    torch.testing.assert_close(total, expected, rtol=1e-9, atol=0)
    parameters = list(gate.parameters())
    assert len(parameters) == (2 if gate.noise_weight is not None else 1)
    for found, right in zip(
        torch.autograd.grad(total, parameters),
        torch.autograd.grad(expected, parameters),
        strict=True,
    ):
        assert right.abs().max() > 1e-3
        torch.testing.assert_close(found, right, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    "options",
    [
        {"k": 2},
        {"k": 2} | VMOE,
        {"k": 2, "capacity": {"factor": 0.7}, "balance_loss": 0.3, "z_loss": 0.1},
        PLAIN | {"second_expert": "random", "balance_counts": "first", "balance_loss": 1.0},
    ],
    ids=str,
)
def test_shares_of_two_ranks_add_up_to_the_loss_of_one(options):
    gate, given = router(**options), rows((7, 4, 6))
    whole = auxiliary_losses([gate.route(given)], [gate], lambda counts: counts).total
    halves = [
        gate.route(RouterInput(x_TD, lengths=lengths, draw_keys=keys))
        for x_TD, lengths, keys in (
            (given.x_TD[:7], (7,), given.draw_keys[:1]),
            (given.x_TD[7:], (4, 6), given.draw_keys[1:]),
        )
    ]
    packed = []
    for routing in halves:
        auxiliary_losses([routing], [gate], lambda counts: packed.append(counts) or counts)
    total = sum(auxiliary_losses([r], [gate], lambda _: sum(packed)).total for r in halves)
    torch.testing.assert_close(total, whole, rtol=1e-10, atol=0)
    parameters = [p for p in gate.parameters() if gate.config.noise != "none" or p is gate.weight]
    for found, right in zip(
        torch.autograd.grad(total, parameters), torch.autograd.grad(whole, parameters), strict=True
    ):
        torch.testing.assert_close(found, right, rtol=1e-8, atol=1e-11)


def test_rows_that_are_not_valid_change_no_loss():
    valid_T = torch.tensor([True] * 5 + [False] * 2 + [True] * 4)
    gate, given = router(k=2, z_loss=0.1), rows(valid_T=valid_T)
    other = replace(given, x_TD=torch.where(valid_T.unsqueeze(1), given.x_TD, 1.0))
    losses = [
        auxiliary_losses([gate.route(one)], [gate], lambda counts: counts).total
        for one in (given, other)
    ]
    assert torch.equal(*losses)


def test_all_experts_for_each_token_are_an_even_load():
    gate = router(k=E, importance_loss=0, load_loss=1.0)
    routing = gate.route(rows())
    assert not auxiliary_losses([routing], [gate], lambda counts: counts).total.any()


@pytest.mark.parametrize("rule", ["all", "none", "threshold", "random"])
def test_a_second_expert_comes_as_the_rule_says_and_never_changes_the_firsts_weight(rule):
    options = PLAIN | {"second_expert": rule, "second_threshold": 0.4}
    gate, given = router(k=2, **options), rows((30, 20))
    drawn_T = gate._draw(given, SECOND, torch.rand, torch.empty(50).double())
    for training in (True, False):
        routing = gate.train(training).route(given)
        kept = 0
        for token, x_D in enumerate(given.x_TD):
            scores = softmax([x_D @ gate.weight[e] for e in range(E)])
            first, second = best(scores, 2)
            weight = scores[second] / (scores[first] + scores[second])
            stays = {
                "all": True,
                "none": False,
                "threshold": bool(weight > 0.4),
                "random": bool(drawn_T[token] < weight / 0.4) if training else True,
            }[rule]
            kept += stays
            assert routing.experts_TK[token].tolist() == [first, second if stays else -1]
            torch.testing.assert_close(routing.weights_TK[token, 0], 1 - weight)
        assert int(routing.extra_counts.get("dropped", 0)) == 50 - kept
        assert int(routing.counts_E.sum()) == 50 + kept
        if rule == "threshold" or (rule == "random" and training):
            assert 0 < kept < 50


def test_the_balance_loss_of_gshard_counts_first_choices_before_drops():
    options = PLAIN | {"second_expert": "random", "capacity": {"factor": 0.5}}
    gate, given = router(balance_loss=1.0, balance_counts="first", **options), rows()
    routing = gate.route(given)
    assert int(routing.extra_counts["dropped"]) > 0
    found = auxiliary_losses([routing], [gate], lambda counts: counts).total
    probabilities_TE = (given.x_TD @ gate.weight.T).softmax(-1)
    first = torch.zeros(E, dtype=torch.float64)
    for token in range(11):
        first[int(probabilities_TE[token].argmax())] += 1 / 11
    torch.testing.assert_close(found, E * (first * probabilities_TE.mean(0)).sum())


def test_the_balance_loss_counts_choices_that_capacity_drops():
    gate, given = router(k=2, balance_loss=1.0, **PLAIN), rows()
    limited = router(k=2, balance_loss=1.0, capacity={"factor": 0.5}, **PLAIN)
    losses = [auxiliary_losses([g.route(given)], [g], lambda c: c) for g in (gate, limited)]
    assert torch.equal(losses[0].total, losses[1].total)
    assert not torch.equal(losses[0].counts_LE, losses[1].counts_LE)


def test_jitter_multiplies_each_input_by_its_own_number():
    gate, given = router(k=1, jitter=0.3, renormalize=False, **PLAIN), rows()
    drawn = gate._draw(given, JITTER, torch.rand, given.x_TD)
    assert 0 <= drawn.min() < 0.1 and 0.9 < drawn.max() < 1
    scores_TE = ((given.x_TD * (0.7 + 0.6 * drawn)) @ gate.weight.T).softmax(-1)
    torch.testing.assert_close(gate.route(given).weights_TK[:, 0], scores_TE.max(-1).values)


def test_draws_are_those_of_their_layer_purpose_seed_and_step():
    given, like = rows(), torch.empty(11, E)
    base = router()._draw(given, NOISE, torch.rand, like)
    assert torch.equal(base, router()._draw(given, NOISE, torch.rand, like))
    layer = Noisy().build(RouterSizes(D, E, layer=3))
    later = router()
    later.after_step(None, [])
    for gate, purpose in (
        (router(), SECOND),
        (router(seed=1), NOISE),
        (layer, NOISE),
        (later, NOISE),
    ):
        assert not torch.equal(base, gate._draw(given, purpose, torch.rand, like))
    resumed = router()
    resumed.load_state_dict(later.state_dict())
    assert torch.equal(resumed.route(given).experts_TK, later.route(given).experts_TK)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"k": 3, "second_expert": "none"}, "second_expert is none, but k is 3; use k: 2"),
        ({"noise": "none"}, "load_loss is 0.1, but noise is none"),
        ({"capacity": {"factor": 0}}, "capacity.factor: it is 0, but should be greater than 0"),
    ],
)
def test_options_that_do_not_fit_get_a_sentence(options, sentence):
    with pytest.raises(moeyard.MoeyardError, match=sentence):
        moeyard.router("noisy", **options)


def test_only_what_evaluation_depends_on_is_architecture():
    plain = Noisy()
    same = Noisy(capacity={"factor": 2.0}, load_loss=0, second_expert="random", seed=3)
    assert same.architecture() == plain.architecture()
    others = ({"noise": "constant"}, {"renormalize": False}, {"second_expert": "threshold"})
    assert all(Noisy(**other).architecture() != plain.architecture() for other in others)


def test_a_routing_of_evaluation_has_no_losses():
    gate = router().eval()
    with pytest.raises(moeyard.MoeyardError, match="call train"):
        auxiliary_losses([gate.route(rows())], [gate], lambda counts: counts)


def test_the_settings_of_papers_on_the_page_are_configurations():
    page = (Path(__file__).parents[2] / "docs" / "routers.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    sections = [yaml.safe_load("{" + part) for part in re.split(r"^{", block, flags=re.M)[1:]]
    assert len(sections) == 16
    for section in sections:
        moeyard.router(**section).build(RouterSizes(D, 16, vocab_size=20))
