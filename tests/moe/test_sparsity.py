"""The sparsity-aware router (MoE-X): it predicts how many units of each expert will be active.

T tokens, D model width, F expert width, E experts.
"""

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F

import moeyard
from moeyard.errors import ConfigError, ModelFileError
from moeyard.kernels.values.main_grads import MainGrads
from moeyard.moe.batch import batch_of_rows
from moeyard.moe.config.moe import MoEConfig
from moeyard.moe.experts.gate_statistics import gate_statistics
from moeyard.moe.experts.path import LocalPath
from moeyard.moe.folders.convert import convert
from moeyard.moe.models.decoder import Decoder
from moeyard.moe.models.initialize import initialize
from moeyard.moe.routers.router import RouterSizes
from moeyard.moe.routers.routing import RouterInput
from moeyard.moe.routers.sparsity import Sparsity

from router_shares import dense, losses_of_ranks, part_of
from small_model import CONFIG, write_decoder

D, WIDTH, E = 7, 5, 4
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def layer_of(bias=False, seed=0, **options) -> moeyard.MoELayer:
    """A layer in fp64 whose gates have means apart from 0."""
    torch.manual_seed(seed)
    layer = moeyard.MoELayer(
        D,
        WIDTH,
        E,
        moeyard.router("sparsity", **options),
        activation="reglu",
        backend="reference",
        expert_bias=bias,
    ).double()
    with torch.no_grad():
        layer.experts.fc1 += 0.5 * torch.randn(E, 1, D)
        if bias:
            layer.experts.fc1_bias.normal_()
            layer.experts.fc2_bias.normal_()
    return layer


def rows(count=9, seed=1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, D, dtype=torch.float64, generator=generator, requires_grad=True)


def logit_of(layer, x_D, expert) -> torch.Tensor:
    """One token's logit for one expert, number by number."""
    gate_FD = layer.experts.fc1[expert][:WIDTH]
    columns = [[gate_FD[f, d] for f in range(WIDTH)] for d in range(D)]
    inputs = list(x_D)
    if layer.experts.fc1_bias is not None:
        columns.append([layer.experts.fc1_bias[expert, f] for f in range(WIDTH)])
        inputs.append(torch.ones((), dtype=torch.float64))
    m, s2 = 0, 0
    for x, column in zip(inputs, columns, strict=True):
        mean = sum(column) / WIDTH
        m = m + x * mean
        s2 = s2 + x**2 * sum((value - mean) ** 2 for value in column) / WIDTH
    return -torch.erf(m / (math.sqrt(2) * s2.sqrt()))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bias", [False, True])
def test_the_sparsest_experts_win_with_gradients_to_rows_gates_and_biases(bias, training):
    layer, x = layer_of(bias, k=3), rows()
    layer.gate.experts_changed()
    routing, expected = layer.train(training).gate.route(RouterInput(x)), 0
    for token in range(len(x)):
        logits = [logit_of(layer, x[token], expert) for expert in range(E)]
        chosen = sorted(range(E), key=lambda e, z=logits: -z[e].item())[:3]
        assert routing.experts_TK[token].tolist() == chosen
        weights = torch.stack([logits[e] for e in chosen]).softmax(dim=0)
        torch.testing.assert_close(routing.weights_TK[token], weights, **CLOSE)
        expected = expected + (weights**3).sum()
    inputs = [x, layer.experts.fc1, *([layer.experts.fc1_bias] if bias else [])]
    if not training:
        inputs = [x]  # statistics are buffers
    found = torch.autograd.grad((routing.weights_TK**3).sum(), inputs)
    for one, other in zip(found, torch.autograd.grad(expected, inputs), strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other, **CLOSE)


def test_there_is_no_matrix_to_learn():
    gate = layer_of().gate
    assert not list(gate.parameters()) and not gate.config.learns
    assert [name for name, _ in gate.named_buffers()] == ["mean_ED", "variance_ED"]


def test_statistics_have_the_gradients_of_finite_differences():
    fc1, bias = layer_of(bias=True).experts.fc1, layer_of(bias=True).experts.fc1_bias
    torch.autograd.gradcheck(lambda *w: gate_statistics(*w, None, WIDTH), (fc1[:2], bias[:2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_main_gradients_get_what_autograd_would_return(dtype):
    fc1 = layer_of().experts.fc1.detach().to(dtype).requires_grad_()
    kept = torch.randn(E, 2, D)
    found = gate_statistics(fc1, None, None, WIDTH)
    assert found.dtype == torch.float32
    (found * kept).sum().backward()
    main = MainGrads.of((torch.full((E, 2 * WIDTH, D), 9.0), torch.zeros(E, D, WIDTH)))
    again = fc1.detach().requires_grad_()
    (gate_statistics(again, None, main, WIDTH) * kept).sum().backward()
    assert again.grad is None and fc1.grad.dtype == dtype
    torch.testing.assert_close(main.fc1_SHD - 9, fc1.grad.float(), rtol=2e-2, atol=2e-3)
    assert (main.fc1_SHD[:, WIDTH:] == 9).all()
    main.is_empty = True
    (gate_statistics(again, None, main, WIDTH) * kept).sum().backward()
    assert (main.fc1_SHD[:, WIDTH:] == 0).all(), "uninitialized memory begins with zeros"


def test_the_prediction_is_near_the_measured_share_of_active_units():
    generator = torch.Generator().manual_seed(0)
    layer = moeyard.MoELayer(512, 2048, 3, Sparsity(k=1), activation="reglu")
    means_ED = 0.02 * torch.randn(3, 512, generator=generator)
    with torch.no_grad():
        noise = torch.randn(layer.experts.fc1.shape, generator=generator)
        layer.experts.fc1.copy_(0.05 * noise + means_ED.unsqueeze(1))
        x_TD = torch.randn(64, 512, generator=generator)
        predicted_TE = (1 + layer.eval().gate.activity(x_TD)) / 2
        gate_ETF = x_TD @ layer.experts.fc1[:, :2048].mT
    measured_TE = (gate_ETF > 0).float().mean(dim=2).T
    assert measured_TE.min() < 0.25 and measured_TE.max() > 0.75, "there is something to predict"
    assert (predicted_TE - measured_TE).abs().max() < 0.03
    routing = layer.gate.route(RouterInput(x_TD))
    sparsest_T = measured_TE.argmin(dim=1)
    assert (routing.experts_TK.flatten() == sparsest_T).float().mean() > 0.9


@pytest.mark.parametrize("bias", [False, True])
def test_the_layer_is_one_wide_masked_mlp(bias):
    layer, x = layer_of(bias, k=2), rows()
    y, routing = layer(x)
    weight_TE = dense(routing, E)
    masked_TF = weight_TE.repeat_interleave(WIDTH, dim=1)
    assert 0 < (masked_TF == 0).float().mean() < 1
    experts = layer.experts
    gate_FD, up_FD = (part.flatten(0, 1) for part in experts.fc1.chunk(2, dim=1))
    down_DF = experts.fc2.transpose(0, 1).flatten(1)
    gate_F = up_F = None
    if bias:
        gate_F, up_F = (part.flatten() for part in experts.fc1_bias.chunk(2, dim=1))
    hidden_TF = F.linear(x, gate_FD, gate_F).relu() * F.linear(x, up_FD, up_F)
    wide = (masked_TF * hidden_TF) @ down_DF.T
    if bias:
        wide = wide + weight_TE @ experts.fc2_bias
    torch.testing.assert_close(y, wide, **CLOSE)
    inputs = [x, *layer.parameters()]
    gradients = [
        torch.autograd.grad((out**2).sum(), inputs, retain_graph=True) for out in (y, wide)
    ]
    for one, other in zip(*gradients, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other, **CLOSE)


def test_evaluation_reads_what_training_or_a_step_left():
    layer, x = layer_of(), rows()
    layer(x)
    before = layer.eval()(x)[1].weights_TK
    with torch.no_grad():
        layer.experts.fc1 *= torch.rand_like(layer.experts.fc1)
    assert torch.equal(layer(x)[1].weights_TK, before), "evaluation reads no gate weights"
    layer.train()
    _, routing = layer(x)
    assert not torch.equal(routing.weights_TK, before)
    assert torch.equal(layer.eval()(x)[1].weights_TK, routing.weights_TK)
    with torch.no_grad():
        layer.experts.fc1 += 0.1 * torch.randn_like(layer.experts.fc1)
    moeyard.after_step([layer], [[routing]])
    after = layer(x)[1].weights_TK
    assert torch.equal(after, layer.train()(x)[1].weights_TK)
    assert not torch.equal(after, routing.weights_TK)


def test_a_layer_that_never_trained_takes_its_weights_once_in_evaluation():
    layer, x = layer_of().eval(), rows()
    assert layer.gate.mean_ED.isnan().all()
    _, routing = layer(x)
    assert torch.equal(routing.weights_TK, layer.train()(x)[1].weights_TK)
    assert layer.gate.mean_ED.isfinite().all()


def test_a_router_that_cannot_know_its_experts_says_so():
    alone = Sparsity().build(RouterSizes(D, E)).eval()
    with pytest.raises(ConfigError, match="does not know its experts' weights"):
        alone.route(RouterInput(rows()))
    part = moeyard.MoELayer(D, WIDTH, E, Sparsity(), activation="reglu", expert_ids=(0, 1))
    assert part.gate_statistics() is None
    with pytest.raises(ConfigError, match="set the layer's path first"):
        part(rows().float())


def test_values_of_experts_elsewhere_come_by_the_path():
    whole = layer_of()
    torch.manual_seed(0)
    part = moeyard.MoELayer(
        D, WIDTH, E, Sparsity(), activation="reglu", expert_ids=(2, 3), backend="reference"
    ).double()
    part.experts.load_state_dict({n: p[2:] for n, p in whole.experts.state_dict().items()})
    others = whole.experts.gate_statistics()[:2]

    class Path(LocalPath):
        def gather(self, values):
            return torch.cat([others, values])

    part.path = Path()
    part.gate.experts_changed()
    whole.gate.experts_changed()
    assert torch.equal(part.gate.mean_ED, whole.gate.mean_ED)
    assert torch.equal(part.gate.variance_ED, whole.gate.variance_ED)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_the_router_of_a_copy_watches_the_copy(how):
    layer, x = layer_of(), rows()
    if how == "deepcopy":
        twin = copy.deepcopy(layer)
    else:
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert "gate.experts.fc1" not in twin.state_dict()
    before = layer(x)[1].weights_TK
    with torch.no_grad():
        twin.experts.fc1 *= torch.rand_like(twin.experts.fc1)
    assert torch.equal(layer(x)[1].weights_TK, before)
    _, routing = twin(x)
    assert not torch.equal(routing.weights_TK, before)
    routing.weights_TK.square().sum().backward()
    assert twin.experts.fc1.grad is not None and layer.experts.fc1.grad is None


def test_statistics_are_saved_with_the_layer():
    layer, x = layer_of(), rows()
    _, routing = layer(x)
    other = layer_of(seed=5).eval()
    other(x)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x)[1].weights_TK, routing.weights_TK)


def test_rows_of_zeros_and_experts_without_variance_have_finite_gradients():
    layer = moeyard.MoELayer(D, 1, E, Sparsity(k=2), activation="reglu", backend="reference")
    x = torch.cat([torch.zeros(1, D), torch.randn(3, D)]).requires_grad_()
    y, routing = layer(x)
    (y.square().sum() + layer.auxiliary_loss(routing)).backward()
    assert x.grad.isfinite().all() and layer.experts.fc1.grad.isfinite().all()
    active_TE = x.detach()[1:] @ layer.experts.fc1[:, 0].T > 0
    assert torch.equal(layer.gate.activity(x)[1:] > 0, active_TE)
    wide = moeyard.MoELayer(D, 6, E, Sparsity(k=2), activation="reglu", backend="reference")
    x = torch.zeros(2, D, requires_grad=True)
    wide(x)[1].weights_TK.square().sum().backward()
    assert (x.grad == 0).all() and (wide.experts.fc1.grad == 0).all()


def test_equal_experts_have_equal_scores():
    layer = layer_of()
    with torch.no_grad():
        layer.experts.fc1.copy_(layer.experts.fc1[:1].expand_as(layer.experts.fc1))
    activity_TE = layer.gate.activity(rows())
    assert activity_TE.abs().min() > 0
    torch.testing.assert_close(activity_TE, activity_TE[:, :1].expand(-1, E), **CLOSE)


def test_shares_of_two_ranks_add_up_to_the_loss_of_one():
    layer = layer_of(balance_loss=0.7, z_loss=0.1)
    given = RouterInput(rows(12).detach(), lengths=(5, 7))
    gradients = []
    for parts in ([given], [part_of(given, 0, 1), part_of(given, 1, 2)]):
        loss = losses_of_ranks(layer.gate, parts)
        gradients.append((loss.detach(), *torch.autograd.grad(loss, layer.experts.fc1)))
    for one, other in zip(*gradients, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)


def test_experts_without_a_relu_and_orders_to_search_are_refused():
    with pytest.raises(ConfigError, match=r"activation is swiglu, .* to relu or reglu"):
        moeyard.MoELayer(D, WIDTH, E, Sparsity())
    with pytest.raises(ValueError, match="set activation to relu or reglu"):
        MoEConfig(num_experts=E, d_expert=WIDTH, router=Sparsity())
    with pytest.raises(ConfigError, match=r"router.kind is sparsity, .* no order to search"):
        moeyard.router("local_search", router={"kind": "sparsity"})


def decoder_of() -> Decoder:
    moe = MoEConfig(num_experts=E, d_expert=32, activation="reglu", router=Sparsity())
    decoder = Decoder(CONFIG.model_copy(update={"moe": moe, "d_model": 32}))
    initialize(decoder, 5)
    return decoder.eval()


@torch.no_grad()
def test_a_model_that_never_trained_is_exported_and_served_from_its_buffers(tmp_path):
    decoder = decoder_of()
    routers = decoder.routers()
    assert all(gate.mean_ED.isfinite().all() for gate in routers)
    write_decoder(tmp_path / "m", decoder, eos_id=256)
    ids_BT = torch.randint(0, 250, (1, 14), generator=torch.Generator().manual_seed(9))
    expected = decoder(batch_of_rows(ids_BT)).routings
    convert(tmp_path / "m", tmp_path / "int8", dtype="int8")
    for folder, options in (("m", {}), ("m", {"expert_memory": "50%"}), ("int8", {})):
        served = moeyard.load(tmp_path / folder, **options).decoder
        for gate, own in zip(served.routers(), routers, strict=True):
            assert torch.equal(gate.variance_ED, own.variance_ED)
        routings = served(batch_of_rows(ids_BT)).routings
        assert torch.equal(routings[0].experts_TK, expected[0].experts_TK)


@torch.no_grad()
def test_a_folder_without_statistics_is_refused(tmp_path):
    decoder = decoder_of()
    decoder.routers()[0].variance_ED.fill_(math.nan)
    write_decoder(tmp_path / "m", decoder, eos_id=256)
    with pytest.raises(ModelFileError, match=r"variance_ED is not finite.*write the folder again"):
        moeyard.load(tmp_path / "m")
    problem = Sparsity().problem_with_tensor("mean_ED", torch.zeros(E, D), E)
    assert problem is None
