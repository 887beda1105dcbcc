"""Routers by distance to centroids (Moirai-MoE), fixed and online."""

import pytest
import torch

import moeyard
from moeyard.moe.routers.kmeans import KMeans, KMeansRouter
from moeyard.moe.routers.kmeans_fit import fit_centroids
from moeyard.moe.routers.kmeans_update import reseed
from moeyard.moe.routers.losses import global_counts
from moeyard.moe.routers.routing import RouterInput

from router_shares import losses_of_ranks

D, E = 6, 5


def router(**options) -> KMeansRouter:
    return KMeansRouter(KMeans(**options), D, E).double()


def rows(count: int = 13, seed: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, D, generator=generator, dtype=torch.float64)


def step(gate: KMeansRouter, parts: list[torch.Tensor]) -> None:
    """Take a step in which each part is a rank's or a micro-batch's."""
    routings = [gate.route(RouterInput(part)) for part in parts]
    counts = [global_counts([routing], lambda counts: counts)[0] for routing in routings]
    whole = counts[0]
    for other in counts[1:]:
        whole = whole.plus(other)
    gate.after_step(whole, [whole])


@pytest.mark.parametrize("side", ["nearest", "farthest"])
def test_weights_are_a_softmax_over_the_chosen_distances(side):
    """In value, and in the gradient of the rows."""
    gate, x_TD = router(k=2, choose=side, temperature=0.7), rows().requires_grad_()
    routing = gate.route(RouterInput(x_TD))
    sign, expected = (-1 if side == "nearest" else 1), []
    for x_D, chosen in zip(x_TD, routing.experts_TK.tolist(), strict=True):
        distances = [sign * (x_D - c_D).norm() / 0.7 for c_D in gate.centroids_ED]
        assert chosen == sorted(range(E), key=lambda e: -distances[e])[:2]
        exps = torch.stack([distances[expert].exp() for expert in chosen])
        expected.append(exps / exps.sum())
    expected = torch.stack(expected)
    torch.testing.assert_close(routing.weights_TK, expected)
    pull = torch.randn_like(expected)
    (found,) = torch.autograd.grad((routing.weights_TK * pull).sum(), x_TD)
    (right,) = torch.autograd.grad((expected * pull).sum(), x_TD)
    assert right.abs().max() > 0
    torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-12)


def test_the_published_gate_takes_the_largest_distances():
    """The released code: ``topk(cdist(x, centroids))``, and a softmax over them in fp32."""
    gate, x_TD = router(k=2, choose="farthest").float(), rows().float()
    values_TK, experts_TK = torch.cdist(x_TD, gate.centroids_ED).topk(2)
    routing = gate.eval().route(RouterInput(x_TD))
    assert torch.equal(routing.experts_TK.long(), experts_TK)
    torch.testing.assert_close(routing.weights_TK, values_TK.softmax(-1), rtol=1e-5, atol=1e-6)


def test_a_row_on_its_centroid_has_finite_gradients_and_centroids_have_none():
    gate = router(k=2)
    x_TD = gate.centroids_ED.clone().requires_grad_()
    routing = gate.route(RouterInput(x_TD))
    assert routing.experts_TK[:, 0].tolist() == list(range(E))
    routing.weights_TK.square().sum().backward()
    assert x_TD.grad.isfinite().all()
    assert not list(gate.parameters()) and not gate.centroids_ED.requires_grad


def test_losses_follow_their_formulas_and_ranks_add_up_to_them():
    gate = router(k=2, balance_loss=0.3, commitment_loss=0.2, update_rate=0.1)
    x_TD = rows().requires_grad_()
    counts, probability_sums = [0] * E, [0.0] * E
    commitment = torch.zeros((), dtype=torch.float64)
    for x_D in x_TD:
        distances = [(x_D - c_D).norm() for c_D in gate.centroids_ED]
        order = sorted(range(E), key=lambda e: distances[e])
        for expert in order[:2]:
            counts[expert] += 1
        total = sum((-distance).exp() for distance in distances)
        for expert in range(E):
            probability_sums[expert] = probability_sums[expert] + (-distances[expert]).exp() / total
        commitment = commitment + (x_D - gate.centroids_ED[order[0]]).square().mean()
    balance = E / (2 * 13**2) * sum(n * p for n, p in zip(counts, probability_sums, strict=True))
    expected = 0.3 * balance + 0.2 * commitment / 13
    (right,) = torch.autograd.grad(expected, x_TD)
    for parts in ([x_TD], [x_TD[:5], x_TD[5:]]):
        total = losses_of_ranks(gate, [RouterInput(part) for part in parts])
        torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)
        (found,) = torch.autograd.grad(total, x_TD)
        torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-12)


def test_centroids_follow_the_mean_of_their_tokens_and_stay_without_any():
    gate, x_TD = router(update_rate=0.25), rows(9)
    before_ED = gate.centroids_ED.clone()
    before_ED[4] = gate.centroids_ED[4] = 100.0
    step(gate, [x_TD])
    for expert in range(E):
        members = [
            x_D
            for x_D in x_TD
            if min(range(E), key=lambda e: (x_D - before_ED[e]).norm()) == expert
        ]
        wanted_D = before_ED[expert]
        if members:
            wanted_D = 0.75 * wanted_D + 0.25 * torch.stack(members).mean(0)
        torch.testing.assert_close(gate.centroids_ED[expert], wanted_D, rtol=0, atol=1e-8)
    assert torch.equal(gate.centroids_ED[4], before_ED[4])
    assert gate.idle_steps_E[4] == 1


def test_parts_of_a_batch_move_the_centroids_exactly_as_the_whole_does():
    whole, parts, x_TD = router(update_rate=0.5), router(update_rate=0.5), 30 * rows(200)
    step(whole, [x_TD])
    step(parts, [x_TD[150:], x_TD[:0], x_TD[:150]])
    assert torch.equal(whole.centroids_ED, parts.centroids_ED)


def test_rows_that_are_not_valid_and_evaluation_leave_the_centroids_alone():
    gate, x_TD = router(update_rate=0.5, commitment_loss=0.1), rows(8)
    valid_T = torch.tensor([True] * 5 + [False] * 3)
    part = gate.route(RouterInput(x_TD, valid_T=valid_T))
    alone = gate.route(RouterInput(x_TD[:5]))
    for name in ("members_E", "sums_ED"):
        assert torch.equal(part.extra_counts[name], alone.extra_counts[name])
    torch.testing.assert_close(part.extras["commitment_sum"], alone.extras["commitment_sum"])
    evaluated = gate.eval().route(RouterInput(x_TD))
    assert not evaluated.extras and not evaluated.extra_counts
    fixed, before = router(), router().centroids_ED
    step(fixed, [x_TD])
    assert torch.equal(fixed.centroids_ED, before)


def test_planted_clusters_are_found_with_reseeding_and_not_without():
    torch.manual_seed(0)
    centres_ED = 3 * torch.eye(E, D, dtype=torch.float64)
    found = {}
    for reseed_after in (0, 2):
        gate = router(k=1, update_rate=0.3, reseed_after=reseed_after)
        gate.centroids_ED[1:] += 50  # far from all tokens: only the first one is ever nearest
        for seed in range(60):
            noise_TD = 0.1 * rows(50, seed)
            step(gate, [centres_ED.repeat(10, 1) + noise_TD])
        nearest = torch.cdist(centres_ED, gate.centroids_ED).min(dim=1)
        found[reseed_after] = len(nearest.indices.unique())
        if reseed_after:
            assert nearest.values.max() < 0.2
    assert found == {0: 1, 2: E}


def test_idle_centroids_take_half_of_the_busiest_ones_one_after_the_other():
    centroids_ED = torch.arange(1.0, 9).view(4, 2)
    idle_steps_E = torch.tensor([3, 0, 5, 1])
    reseed(centroids_ED, idle_steps_E, torch.tensor([0, 10, 0, 6]), after=3)
    up, down = 1 + 1 / 1024, 1 - 1 / 1024
    # Expert 1 has 10 tokens and 5 are left, so expert 2 takes from expert 3, which has 6.
    wanted = [[3 * up, 4 * down], [3 * down, 4 * up], [7 * up, 8 * down], [7 * down, 8 * up]]
    torch.testing.assert_close(centroids_ED, torch.tensor(wanted), rtol=1e-7, atol=0)
    assert idle_steps_E.tolist() == [0, 0, 0, 1]
    alone_ED = centroids_ED.clone()
    reseed(alone_ED, torch.tensor([3, 0, 3, 3]), torch.tensor([0, 1, 0, 0]), after=3)
    assert torch.equal(alone_ED, centroids_ED)  # one token cannot be shared


def test_centroids_may_come_from_rows_of_the_data():
    layer = moeyard.MoELayer(D, 4, E, KMeans(k=1))
    centres_ED = 9 * torch.eye(E, D)
    x_TD = centres_ED.repeat(8, 1) + rows(40).float()
    layer.gate.centroids_ED.copy_(fit_centroids(x_TD, E))
    _, routing = layer.eval()(x_TD)
    by_centre = routing.experts_TK.view(8, E)
    assert (by_centre == by_centre[:1]).all() and len(by_centre[0].unique()) == E
    assert (routing.weights_TK == 1).all()


def test_state_comes_back():
    gate = router(update_rate=0.5, reseed_after=3)
    for seed in range(4):
        step(gate, [rows(3, seed)])
    other = router(update_rate=0.5, reseed_after=3)
    other.load_state_dict(gate.state_dict())
    for each in (gate, other):
        step(each, [rows(3, 9)])
    assert torch.equal(gate.centroids_ED, other.centroids_ED)
    assert torch.equal(gate.idle_steps_E, other.idle_steps_E)


def test_seed_and_layer_change_the_first_centroids():
    first = router().centroids_ED
    assert torch.equal(first, router().centroids_ED)
    for other in (router(seed=1), KMeansRouter(KMeans(), D, E, layer=1)):
        assert not torch.equal(first, other.centroids_ED)
    assert KMeans(seed=1).architecture() == KMeans(balance_loss=0).architecture()


def test_options_that_contradict_each_other_get_one_sentence():
    with pytest.raises(ValueError, match="choose is farthest, where centroids cannot follow"):
        KMeans(choose="farthest", update_rate=0.1)
    with pytest.raises(ValueError, match="reseed_after is 5, but update_rate is 0"):
        KMeans(reseed_after=5)


def test_a_row_has_the_same_choice_alone():
    gate, x_TD = KMeansRouter(KMeans(k=2), 24, 8).eval(), torch.randn(40, 24)
    with torch.inference_mode():
        whole = gate.route(RouterInput(x_TD)).weights_TK
        alone = torch.cat([gate.route(RouterInput(x_D)).weights_TK for x_D in x_TD.split(1)])
    assert torch.equal(whole, alone)


def test_it_compiles_to_one_graph():
    gate, x_TD = router(k=2, update_rate=0.1).float(), rows().float()
    compiled = torch.compile(
        lambda x: gate.route(RouterInput(x)).weights_TK, fullgraph=True, backend="eager"
    )
    assert torch.equal(compiled(x_TD), gate.route(RouterInput(x_TD)).weights_TK)
