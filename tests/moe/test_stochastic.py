"""Random experts in training (THOR)."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import moeyard
from moeyard.moe.batch import batch_of_rows
from moeyard.moe.config.model import ModelConfig
from moeyard.moe.config.moe import MoEConfig
from moeyard.moe.models.decoder import Decoder
from moeyard.moe.routers.loss_terms import GlobalCounts
from moeyard.moe.routers.routing import Lookahead, RouterInput
from moeyard.moe.routers.stochastic import Stochastic, StochasticRouter

E = 6
IDS = torch.arange(12)
GIVEN = RouterInput(ids_T=IDS, lengths=(4, 3, 5), draw_keys=(11, 12, 13))


def router(layer: int = 0, **options) -> StochasticRouter:
    return StochasticRouter(Stochastic(**options), E, layer)


def next_step(gate: StochasticRouter) -> None:
    gate.after_step(GlobalCounts(torch.zeros(E), torch.tensor(0), {}), [])


def draws(gate: StochasticRouter, given: RouterInput = GIVEN, steps: int = 300) -> torch.Tensor:
    """Return the choices of the rows at many steps, ``[steps, T, K]``."""
    found = []
    for _ in range(steps):
        found.append(gate.route(given).experts_TK)
        next_step(gate)
    return torch.stack(found)


def test_a_batch_draws_one_set_of_experts_each_step_whatever_its_tokens():
    found = draws(router(k=2))
    assert (found == found[:, :1]).all() and (found[..., 0] != found[..., 1]).all()
    other = draws(router(k=2), RouterInput(ids_T=IDS[:2], lengths=(2,), draw_keys=(5,)))
    assert torch.equal(found[:, :2], other)
    assert torch.equal(found[:, :2], draws(router(k=2), RouterInput(ids_T=IDS[:2])))
    counts = found[:, 0].flatten().bincount(minlength=E)
    assert counts.min() > 60 and counts.max() < 140  # 100 each on average


def test_a_sequence_draws_by_itself_and_the_same_on_any_rank():
    found = draws(router(drawn_per="sequence"))[..., 0]
    for first, last in ((0, 4), (4, 7), (7, 12)):
        assert (found[:, first:last] == found[:, first : first + 1]).all()
    same = (found[:, 0] == found[:, 4]).sum()
    assert 20 < same < 90  # 50 on average
    one = RouterInput(ids_T=IDS[4:7], lengths=(3,), draw_keys=(12,))
    assert torch.equal(draws(router(drawn_per="sequence"), one)[..., 0], found[:, 4:7])


def test_seed_and_layer_change_the_draws():
    first = draws(router())
    assert torch.equal(first, draws(router()))
    assert not torch.equal(first, draws(router(layer=1)))
    assert not torch.equal(first, draws(router(seed=1)))


def test_a_resumed_run_goes_on_with_its_draws():
    gate, other = router(), router()
    draws(gate, steps=7)
    other.load_state_dict(gate.state_dict())
    assert torch.equal(draws(gate, steps=20), draws(other, steps=20))


def test_a_layer_alone_draws_for_each_of_its_sequences():
    torch.manual_seed(0)
    layer = moeyard.MoELayer(8, 4, E, Stochastic(drawn_per="sequence"))
    _, routing = layer(torch.randn(40, 3, 8))
    experts_BT = routing.experts_TK.view(40, 3)
    assert (experts_BT == experts_BT[:, :1]).all() and len(experts_BT.unique()) == E


def test_evaluation_is_the_mean_of_all_experts_or_one_of_them():
    torch.manual_seed(0)
    layer = moeyard.MoELayer(8, 4, E, Stochastic(), backend="reference").double().eval()
    x_TD = torch.randn(5, 8, dtype=torch.float64)
    outputs_E = []
    for expert in range(E):
        gate_TF, up_TF = (x_TD @ layer.experts.fc1[expert].T).chunk(2, dim=1)
        hidden_TF = torch.nn.functional.silu(gate_TF) * up_TF
        outputs_E.append(hidden_TF @ layer.experts.fc2[expert].T)
    torch.testing.assert_close(layer(x_TD)[0], sum(outputs_E) / E)
    fixed = moeyard.MoELayer(8, 4, E, Stochastic(k=2, evaluation="fixed"), backend="reference")
    fixed.double().load_state_dict(layer.state_dict())
    wanted = (outputs_E[0] + outputs_E[1]) / 2
    torch.testing.assert_close(fixed.eval()(x_TD)[0], wanted)
    assert layer.lookahead is Lookahead.TOKEN


def test_only_drawn_experts_get_gradients():
    layer = moeyard.MoELayer(8, 4, E, Stochastic(), backend="reference")
    y, routing = layer(torch.randn(5, 8))
    y.sum().backward()
    drawn = int(routing.experts_TK[0, 0])
    moved = layer.experts.fc1.grad.abs().amax(dim=(1, 2)) > 0
    assert moved.nonzero().flatten().tolist() == [drawn]


@pytest.mark.parametrize("drawn_per", ["batch", "sequence"])
def test_a_recomputed_layer_draws_the_same_again(drawn_per):
    layer = moeyard.MoELayer(8, 4, E, Stochastic(drawn_per=drawn_per), backend="reference")
    x = torch.randn(3, 5, 8, requires_grad=True)
    torch.manual_seed(3)
    plain = torch.autograd.grad(layer(x)[0].square().sum(), x)[0]
    torch.manual_seed(3)
    again = checkpoint(lambda x: layer(x)[0], x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(again.square().sum(), x)[0], plain)


def test_layers_of_a_model_draw_differently():
    moe = MoEConfig(num_experts=E, d_expert=4, router=Stochastic(drawn_per="sequence"))
    config = ModelConfig(vocab_size=30, d_model=8, num_layers=2, num_heads=2, moe=moe)
    output = Decoder(config)(batch_of_rows(torch.arange(24).view(12, 2)))
    first, second = (routing.experts_TK for routing in output.routings)
    assert not torch.equal(first, second)
