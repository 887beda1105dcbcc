"""The loss terms of a layer in a user's model: values and all gradients of the formulas.

T tokens, D model width, E experts, K choices.
"""

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import moeyard
from moeyard.errors import ConfigError

D = 12


def layer(num_experts: int = 6, **router) -> moeyard.MoELayer:
    config = moeyard.TopK(**{"k": 2, "balance_loss": 0.3} | router)
    return moeyard.MoELayer(D, 8, num_experts, config, backend="reference").double()


def counts_and_scores(moe: moeyard.MoELayer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return n_E, the softmax of a softmax router in rows of E, and its logits."""
    logits_TE = x.reshape(-1, D) @ moe.gate.weight.T
    scores_TE = logits_TE.softmax(dim=-1)
    chosen_TK = scores_TE.topk(moe.gate.k, dim=-1).indices
    counts_E = torch.nn.functional.one_hot(chosen_TK, moe.gate.num_experts).sum(dim=(0, 1))
    return counts_E.double(), scores_TE, logits_TE


def formula(moe: moeyard.MoELayer, x: Tensor) -> Tensor:
    """Return balance, sequence balance and z of one layer, with their coefficients."""
    router, total = moe.gate.config, 0

    def balance(rows):
        counts_E, scores_TE, _ = counts_and_scores(moe, rows)
        fraction_E = counts_E / (len(scores_TE) * router.k)
        return moe.gate.num_experts * (fraction_E * scores_TE.mean(dim=0)).sum()

    total = router.balance_loss * balance(x)
    total = total + router.sequence_balance_loss * torch.stack([balance(row) for row in x]).mean()
    _, _, logits_TE = counts_and_scores(moe, x)
    return total + router.z_loss * logits_TE.logsumexp(dim=-1).square().mean()


def pooled(layers: list[moeyard.MoELayer], inputs: list[Tensor]) -> Tensor:
    """Return the balance loss of layers whose counts and probabilities are pooled."""
    found = [counts_and_scores(moe, x) for moe, x in zip(layers, inputs, strict=True)]
    num_rows = sum(len(scores_TE) for _, scores_TE, _ in found)
    fraction_E = sum(counts_E for counts_E, _, _ in found) / (num_rows * layers[0].gate.k)
    mean_E = sum(scores_TE.sum(dim=0) for _, scores_TE, _ in found) / num_rows
    return layers[0].gate.num_experts * (fraction_E * mean_E).sum()


def assert_same(found: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    gradients = torch.autograd.grad(found, leaves, retain_graph=True)
    for gradient, right in zip(gradients, torch.autograd.grad(expected, leaves), strict=True):
        assert right.abs().max() > 0
        torch.testing.assert_close(gradient, right, rtol=1e-10, atol=1e-14)


def some_rows(rows: int = 3, length: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, length, D, dtype=torch.float64, generator=generator)
    return x.requires_grad_()


@pytest.mark.parametrize(
    "router",
    [
        {},
        {"k": 3, "z_loss": 0.2},
        {"sequence_balance_loss": 0.4},
        {"balance_loss": 0.0, "z_loss": 0.1},
        {"balance_over": "model", "z_loss": 0.2},
    ],
    ids=["balance", "z", "sequence", "z_alone", "pooled"],
)
def test_a_layers_loss_is_the_formula_in_value_and_gradients(router):
    torch.manual_seed(0)
    moe, x = layer(**router), some_rows()
    _, routing = moe(x)
    assert_same(moe.auxiliary_loss(routing), formula(moe, x), [moe.gate.weight, x])


def test_layers_of_any_sizes_add_up():
    torch.manual_seed(0)
    layers, inputs = [layer(6), layer(4, k=1, z_loss=0.1)], [some_rows(3), some_rows(2, 5)]
    routings = [moe(x)[1] for moe, x in zip(layers, inputs, strict=True)]
    expected = sum(formula(moe, x) for moe, x in zip(layers, inputs, strict=True))
    leaves = [*inputs, *(moe.gate.weight for moe in layers)]
    assert_same(moeyard.auxiliary_loss(layers, routings), expected, leaves)


def test_layers_that_pool_are_one_loss_and_others_are_not_in_it():
    torch.manual_seed(0)
    layers = [layer(balance_over="model"), layer(), layer(balance_over="model"), layer(4, k=1)]
    inputs = [some_rows(rows) for rows in (2, 3, 4, 1)]
    routings = [moe(x)[1] for moe, x in zip(layers, inputs, strict=True)]
    expected = 0.3 * pooled(layers[::2], inputs[::2])
    expected = expected + formula(layers[1], inputs[1]) + formula(layers[3], inputs[3])
    leaves = [*inputs, *(moe.gate.weight for moe in layers)]
    assert_same(moeyard.auxiliary_loss(layers, routings), expected, leaves)


def test_hash_routers_have_no_loss():
    fixed = moeyard.MoELayer(D, 8, 6, moeyard.Hash(), vocab_size=9).double()
    x = some_rows()
    _, routing = fixed(x, token_ids=torch.arange(21).view(3, 7) % 9)
    assert fixed.auxiliary_loss(routing) == 0
    moe = layer()
    both = moeyard.auxiliary_loss([fixed, moe], [routing, moe(x)[1]])
    torch.testing.assert_close(both, formula(moe, x))


def test_one_step_of_adamw_evens_the_load():
    """Without the loss it does not: nothing else in the layer evens the load."""

    def largest_share(coefficient: float) -> float:
        torch.manual_seed(0)
        moe = layer(balance_loss=coefficient)
        x = torch.randn(64, D, dtype=torch.float64) + 0.7
        optimizer = torch.optim.AdamW(moe.parameters(), lr=0.02, weight_decay=0.0)
        for _ in range(40):
            y, routing = moe(x)
            loss = (y - x).square().mean() + moe.auxiliary_loss(routing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return float(moe(x)[1].counts_E.max() / 128)

    assert largest_share(0.3) < 0.25 < largest_share(0.0)


def test_a_checkpointed_layer_has_the_same_gradients_and_a_reentrant_one_is_refused():
    torch.manual_seed(0)
    moe, x = layer(z_loss=0.1), some_rows()
    _, routing = checkpoint(moe, x, use_reentrant=False)
    assert_same(moe.auxiliary_loss(routing), formula(moe, x), [moe.gate.weight, x])
    _, routing = checkpoint(moe, x, use_reentrant=True)
    with pytest.raises(ConfigError, match="use_reentrant=False"):
        moe.auxiliary_loss(routing)


def test_a_routing_that_cannot_have_a_loss_gets_one_sentence():
    moe, x = layer(), some_rows()
    with pytest.raises(ConfigError, match=r"call train\(\) on the layer"):
        moe.auxiliary_loss(moe.eval()(x)[1])
    with torch.no_grad():
        _, routing = moe.train()(x)
        assert moe.auxiliary_loss(routing) > 0  # for logs
    with pytest.raises(ConfigError, match=r"out of torch.no_grad\(\)"):
        moe.auxiliary_loss(routing)
    with pytest.raises(ConfigError, match="there are 2 MoE layers and 1 routings"):
        moeyard.auxiliary_loss([moe, moe], [routing])
    moe.gate.requires_grad_(False)
    assert moe.auxiliary_loss(moe(x.detach())[1]) > 0  # frozen: there is no gradient to lose


def test_micro_batches_add_up_to_their_mean():
    """The loss is taken over each micro-batch, so a step of n divides each one's by n."""
    torch.manual_seed(0)
    moe = layer()
    parts = [some_rows(2), some_rows(4)]
    expected = sum(formula(moe, x) for x in parts) / 2
    (right,) = torch.autograd.grad(expected, [moe.gate.weight])
    for x in parts:
        (moe.auxiliary_loss(moe(x)[1]) / 2).backward()
    torch.testing.assert_close(moe.gate.weight.grad, right, rtol=1e-10, atol=1e-14)
