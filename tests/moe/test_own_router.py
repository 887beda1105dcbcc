"""A user's router in a layer and in a decoder works like one of ours."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import moeyard
from moeyard.errors import ConfigError
from moeyard.moe.batch import batch_of_rows
from moeyard.moe.config.model import ModelConfig
from moeyard.moe.config.moe import MoEConfig
from moeyard.moe.models.decoder import Decoder
from moeyard.moe.models.initialize import initialize
from moeyard.moe.models.lora import add_lora
from moeyard.training.precision import apply_precision

from cosine_router import Cosine, CosineRouter

D, E = 12, 5
IDS = torch.arange(18).view(2, 9)


def layer(**router) -> moeyard.MoELayer:
    torch.manual_seed(0)
    router = Cosine(**({"k": 2} | router))
    return moeyard.MoELayer(D, 8, E, router, backend="reference").double()


def model_config(router: moeyard.RouterConfig) -> ModelConfig:
    moe = MoEConfig(num_experts=E, d_expert=8, router=router)
    return ModelConfig(vocab_size=20, d_model=16, num_layers=2, num_heads=2, moe=moe)


def by_hand(moe: moeyard.MoELayer, x_TD: torch.Tensor) -> torch.Tensor:
    """Return the layer's output, one row and one choice at a time."""
    gate, experts = moe.gate, moe.experts
    rows = []
    for x_D in x_TD:
        place_P = gate.project(x_D)
        cosines_E = torch.stack(
            [place_P @ d_P / (place_P.norm() * d_P.norm()) for d_P in gate.directions_EP]
        )
        scores_E = (cosines_E / gate.temperature).exp()
        scores_E = scores_E / scores_E.sum()
        y_D = torch.zeros(D, dtype=torch.float64)
        for expert in scores_E.sort(descending=True).indices[: gate.k].tolist():
            gated, up = (experts.fc1[expert] @ x_D).chunk(2)
            hidden_F = torch.nn.functional.silu(gated) * up
            y_D = y_D + scores_E[expert] * (experts.fc2[expert] @ hidden_F)
        rows.append(y_D)
    return torch.stack(rows)


def test_a_layer_computes_what_the_router_chooses_with_gradients_of_all_its_parameters():
    moe = layer(confidence_loss=0.5)
    x_TD = torch.randn(7, D, dtype=torch.float64, requires_grad=True)
    y_TD, _ = moe(x_TD)
    expected_TD = by_hand(moe, x_TD)
    torch.testing.assert_close(y_TD, expected_TD, rtol=1e-10, atol=1e-12)
    leaves = [x_TD, *moe.gate.parameters()]
    assert len(leaves) == 4
    found = torch.autograd.grad(y_TD.square().sum(), leaves, retain_graph=True)
    right = torch.autograd.grad(expected_TD.square().sum(), leaves, retain_graph=True)
    for gradient, expected in zip(found, right, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-11)


def test_its_loss_is_over_the_batch_of_all_ranks():
    moe = layer(confidence_loss=0.5)
    x_TD = torch.randn(10, D, dtype=torch.float64)
    whole = moe(x_TD)[1]
    parts = [moe(part)[1] for part in x_TD.split([3, 7])]
    counted = whole.extra_counts["confident"]
    assert 0 < int(counted) < 10
    expected = 0.5 * whole.extras["confidence_sum"] / counted
    torch.testing.assert_close(moe.auxiliary_loss(whole), expected)

    def flat(routing):
        counts = (routing.counts_E, routing.num_tokens, *routing.extra_counts.values())
        return torch.cat([count.view(-1) for count in counts])

    everyone = sum(flat(part) for part in parts)
    shares = [moe.auxiliary_loss(part, lambda _: everyone) for part in parts]
    torch.testing.assert_close(sum(shares), expected, rtol=1e-13, atol=0)


def test_its_loss_adds_to_that_of_other_routers_and_recompute_keeps_it():
    own = layer(confidence_loss=0.5)
    other = moeyard.MoELayer(D, 8, E, moeyard.TopK(k=2), backend="reference").double()
    x_TD = torch.randn(6, D, dtype=torch.float64, requires_grad=True)
    routings = [own(x_TD)[1], other(x_TD)[1]]
    both = moeyard.auxiliary_loss([own, other], routings)
    apart = own.auxiliary_loss(routings[0]) + other.auxiliary_loss(routings[1])
    torch.testing.assert_close(both, apart)
    again = own.auxiliary_loss(checkpoint(own, x_TD, use_reentrant=False)[1])
    plain = own.auxiliary_loss(routings[0])
    right = torch.autograd.grad(plain, list(own.gate.parameters()))
    for found, expected in zip(
        torch.autograd.grad(again, list(own.gate.parameters())), right, strict=True
    ):
        assert torch.equal(found, expected)
    with pytest.raises(ConfigError, match="use_reentrant=False"):
        own.auxiliary_loss(checkpoint(own, x_TD, use_reentrant=True)[1])


def test_a_routing_is_a_tree_with_its_extras():
    moe = layer()
    x_TD = torch.randn(4, D, dtype=torch.float64)
    values, spec = torch.utils._pytree.tree_flatten(moe(x_TD)[1])
    assert len(values) == 6
    again = torch.utils._pytree.tree_unflatten([value.detach() for value in values], spec)
    assert again.extras.keys() == {"confidence_sum"}
    assert not again.extras["confidence_sum"].requires_grad


def test_initial_weights_depend_on_the_seed_alone_and_scalars_are_one():
    decoders = [Decoder(model_config(Cosine(k=2))) for _ in range(2)]
    for decoder in decoders:
        initialize(decoder, seed=5)
    for one, two in zip(*(decoder.parameters() for decoder in decoders), strict=True):
        assert torch.equal(one, two)
    gates = decoders[0].routers()
    assert all(isinstance(gate, CosineRouter) and gate.temperature == 1 for gate in gates)
    assert not torch.equal(gates[0].project.weight, gates[1].project.weight)


def test_it_stays_in_fp32_under_bf16_and_frozen_under_lora():
    decoder = Decoder(model_config(Cosine(k=2)))
    masters = apply_precision(decoder, "bf16")
    for name, parameter in decoder.named_parameters():
        is_router = ".gate." in name
        assert parameter.dtype == (torch.float32 if is_router else torch.bfloat16), name
        assert (name in masters) != is_router
    decoder(batch_of_rows(IDS))  # the rows are bf16, the router is not
    add_lora(decoder, 2, 4.0, ["attention"], seed=0)
    assert not any(p.requires_grad for gate in decoder.routers() for p in gate.parameters())


class OfTokens(moeyard.RouterConfig):
    """Reads only token ids; its configuration says where it is called."""

    learns = False
    needs_token_counts = True

    def reads_at(self):
        return moeyard.Lookahead.TOKEN

    def build(self, sizes):
        assert sizes.vocab_size == 20 and sizes.token_counts == [3] * 20
        return OfTokensRouter(self, sizes.num_experts)


class OfTokensRouter(moeyard.Router):
    def route(self, router_input):
        assert router_input.x_TD is None
        ids_T = router_input.ids_T
        experts_TK = torch.stack([ids_T % E, (ids_T + 1) % E], dim=1).int()
        return moeyard.Routing(
            experts_TK,
            torch.full(experts_TK.shape, 0.5),
            torch.bincount(experts_TK.flatten(), minlength=E),
            torch.tensor(len(ids_T)),
        )


def test_the_decoder_calls_it_where_it_reads():
    decoder = Decoder(model_config(OfTokens()), token_counts=[3] * 20)
    routings = decoder(batch_of_rows(IDS)).routings
    assert torch.equal(routings[1].experts_TK[:, 0], IDS.flatten().int() % E)


class WithoutBuild(moeyard.RouterConfig):
    pass


class BuildsNothing(moeyard.RouterConfig):
    def build(self, sizes):
        return torch.nn.Linear(2, 2)


class TakenName(Cosine):
    kind: str = "topk"


@pytest.mark.parametrize(
    ("router", "message"),
    [
        (Cosine(k=6), r"router\.k is 6, but the layer has 5 experts; use a value from 1 to 5\."),
        (WithoutBuild(), r"router is WithoutBuild, which has no build\(self, sizes\); define it"),
        (BuildsNothing(), "whose build returned a Linear; return a moeyard.Router"),
        (CosineRouter, "give the configuration of a router, such as moeyard.TopK"),
    ],
    ids=["k", "no_build", "no_router", "a_module"],
)
def test_what_cannot_be_a_layers_router_gets_one_sentence(router, message):
    with pytest.raises(ConfigError, match=message):
        moeyard.MoELayer(D, 8, E, router)


@pytest.mark.parametrize(
    ("router", "message"),
    [
        (TakenName(), "TakenName, which calls itself 'topk'.* remove kind from the class"),
        (WithoutBuild(), r"has no build\(self, sizes\)"),
    ],
)
def test_what_cannot_stand_in_a_configuration_gets_one_sentence(router, message):
    with pytest.raises(ValueError, match=message):
        model_config(router)


def test_a_configuration_keeps_its_fields_and_names_it_by_its_import_path():
    values = model_config(Cosine(k=3, width=7)).model_dump(mode="json")
    assert values["moe"]["router"] == {
        "kind": "cosine_router:Cosine",
        "k": 3,
        "width": 7,
        "confidence_loss": 0.0,
    }
    found = model_config(Cosine(k=3, confidence_loss=0.2)).architecture()
    assert found == model_config(Cosine(k=3)).architecture()
    assert found != model_config(Cosine(k=3, width=5)).architecture()
