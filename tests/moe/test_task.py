"""The routers that know a token's task (M3ViT)."""

import math

import pytest
import torch

import moeyard
from moeyard.errors import ConfigError
from moeyard.moe.batch import Batch
from moeyard.moe.config.model import ModelConfig
from moeyard.moe.config.moe import MoEConfig
from moeyard.moe.models.decoder import Decoder
from moeyard.moe.routers.routing import RouterInput
from moeyard.moe.routers.task import Task, TaskRouter, variation

from router_shares import losses_of_ranks

D, E, N = 6, 5, 3
forms = pytest.mark.parametrize("form", ["gates", "vector"])


def router(form: str, k: int = 2, **options) -> TaskRouter:
    torch.manual_seed(0)
    return TaskRouter(Task(k=k, num_tasks=N, form=form, d_task=4, **options), D, E).double()


def rows(count: int = 13) -> RouterInput:
    generator = torch.Generator().manual_seed(2)
    x_TD = torch.randn(count, D, generator=generator, dtype=torch.float64, requires_grad=True)
    return RouterInput(x_TD, tasks_T=torch.randint(N, (count,), generator=generator))


def scores(gate: TaskRouter, x_D: torch.Tensor, task: int) -> torch.Tensor:
    """Return one token's probabilities by the formula, with the concatenation."""
    if gate.config.form == "gates":
        logits = torch.stack([row @ x_D for row in gate.weight[task]])
    else:
        first, _, second, norm = gate.task_vector
        one_hot = torch.tensor([float(n == task) for n in range(N)], dtype=torch.float64)
        hidden = first.weight @ one_hot + first.bias
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        hidden = second.weight @ hidden + second.bias
        centred = hidden - hidden.mean()
        vector = centred / (centred.square().mean() + 1e-6).sqrt() * norm.weight + norm.bias
        logits = torch.stack([row @ torch.cat((x_D, vector)) for row in gate.weight])
    return logits.exp() / logits.exp().sum()


@forms
def test_the_best_experts_for_the_task_have_their_probabilities(form):
    """With gradients of all parameters, against the formula row by row."""
    gate, given = router(form), rows()
    routing = gate.route(given)
    expected = []
    rows_of_all = (given.x_TD, given.tasks_T.tolist(), routing.experts_TK.tolist())
    for x_D, task, chosen in zip(*rows_of_all, strict=True):
        scores_E = scores(gate, x_D, task)
        assert chosen == sorted(range(E), key=lambda e: -scores_E[e])[:2]
        expected.append(scores_E[chosen])
    expected = torch.stack(expected)
    torch.testing.assert_close(routing.weights_TK, expected)
    leaves = [given.x_TD, *gate.parameters()]
    assert len(leaves) == (2 if form == "gates" else 8)
    pull = torch.randn_like(expected)
    found = torch.autograd.grad((routing.weights_TK * pull).sum(), leaves)
    right = torch.autograd.grad((expected * pull).sum(), leaves)
    for gradient, wanted in zip(found, right, strict=True):
        assert wanted.abs().max() > 0
        torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-12)


def test_a_gate_learns_from_the_tokens_of_its_own_task_alone():
    gate, given = router("gates"), rows()
    given = RouterInput(given.x_TD, tasks_T=torch.ones(13, dtype=torch.int64))
    gate.route(given).weights_TK.square().sum().backward()
    assert gate.weight.grad[1].abs().max() > 0
    assert gate.weight.grad[[0, 2]].abs().max() == 0


@forms
def test_the_importance_loss_follows_its_formula_and_ranks_add_up_to_it(form):
    gate, given = router(form, importance_loss=0.3), rows()
    expected = torch.zeros((), dtype=torch.float64)
    for task in range(N):
        importance = [torch.zeros((), dtype=torch.float64) for _ in range(E)]
        for x_D, own in zip(given.x_TD, given.tasks_T.tolist(), strict=True):
            scores_E = scores(gate, x_D, own)
            for expert in scores_E.topk(2).indices.tolist() if own == task else ():
                importance[expert] = importance[expert] + scores_E[expert]
        mean = sum(importance) / E
        variance = sum((value - mean) ** 2 for value in importance) / (E - 1)
        expected = expected + 0.3 * variance / (mean**2 + 1e-10)
    halves = [
        RouterInput(given.x_TD[r], tasks_T=given.tasks_T[r]) for r in (slice(5), slice(5, 13))
    ]
    leaves = [given.x_TD, *gate.parameters()]
    right = torch.autograd.grad(expected, leaves, retain_graph=True)
    for parts in ([given], halves):
        total = losses_of_ranks(gate, parts)
        torch.testing.assert_close(total, expected, rtol=1e-9, atol=0)
        found = torch.autograd.grad(total, leaves)
        for gradient, wanted in zip(found, right, strict=True):
            torch.testing.assert_close(gradient, wanted, rtol=1e-7, atol=1e-10)


def test_a_task_without_tokens_and_a_single_expert_have_no_variation():
    even = torch.tensor([[2.0, 2.0], [0.0, 0.0]], requires_grad=True)
    loss = variation(even)
    assert loss.item() == 0 and torch.autograd.grad(loss, even)[0].isfinite().all()
    assert float(variation(torch.tensor([[3.0]]))) == 0


def test_tasks_that_are_missing_or_unknown_get_one_sentence():
    gate, given = router("gates"), rows(3)
    with pytest.raises(ConfigError, match="reads each token's task; pass tasks to the layer"):
        gate.route(RouterInput(given.x_TD))
    with pytest.raises(ConfigError, match="tasks has 3; use numbers from 0 to 2"):
        gate.route(RouterInput(given.x_TD, tasks_T=torch.tensor([0, 3, 1])))
    with pytest.raises(ConfigError, match="tasks has -1; use numbers from 0 to 2"):
        gate.route(RouterInput(given.x_TD, tasks_T=torch.tensor([0, 3, -1])))
    valid = torch.tensor([True, False, True])
    routing = gate.route(RouterInput(given.x_TD, tasks_T=torch.tensor([0, 9, 1]), valid_T=valid))
    assert routing.experts_TK[1].tolist() == [-1, -1]
    with pytest.raises(ConfigError, match="keep in training mode only"):
        gate.losses(gate.eval().route(given), None)


def test_a_layer_and_a_decoder_pass_the_tasks_on():
    layer = moeyard.MoELayer(D, 4, E, Task(k=1, num_tasks=N)).eval()
    x_BTD, tasks_BT = torch.randn(2, 4, D), torch.randint(N, (2, 4))
    _, routing = layer(x_BTD, tasks=tasks_BT)
    alone = layer.gate.route(RouterInput(x_BTD.flatten(0, 1), tasks_T=tasks_BT.flatten()))
    assert torch.equal(routing.experts_TK, alone.experts_TK)
    moe = MoEConfig(num_experts=E, d_expert=8, router=Task(k=2, num_tasks=N))
    decoder = Decoder(ModelConfig(vocab_size=9, d_model=16, num_layers=1, num_heads=2, moe=moe))
    ids_T, positions_T = torch.arange(4), torch.arange(4)
    outputs = [
        decoder(Batch(ids_T, positions_T, (4,), tasks_T=torch.full((4,), task))).hidden_TD
        for task in (0, 1, 0)
    ]
    assert torch.equal(outputs[0], outputs[2]) and not torch.equal(outputs[0], outputs[1])


@forms
def test_autocast_does_not_round_what_the_loss_sums(form):
    gate, given = router(form).float(), rows()
    given = RouterInput(given.x_TD.detach().float(), tasks_T=given.tasks_T)
    plain = gate.route(given).extras["importance_NE"]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gate.route(given).extras["importance_NE"], plain)


@forms
def test_it_compiles_to_one_graph(form):
    gate, given = router(form).float(), rows()
    x_TD = given.x_TD.detach().float()

    def weights(x_TD: torch.Tensor, tasks_T: torch.Tensor) -> torch.Tensor:
        return gate.route(RouterInput(x_TD, tasks_T=tasks_T)).weights_TK

    compiled = torch.compile(weights, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x_TD, given.tasks_T), weights(x_TD, given.tasks_T))


def test_architecture_leaves_out_what_does_not_change_the_weights():
    assert Task(d_task=3).architecture() == Task(importance_loss=1.0).architecture()
    assert Task(form="vector").architecture() != Task(form="vector", d_task=3).architecture()
