"""What every router must do: count, keep its state, train, export, load, decode and be offloaded.

T tokens, D model width, E experts, K choices.
"""

import dataclasses

import pytest
import torch

import moeyard
from moeyard.errors import ConfigError
from moeyard.moe.batch import batch_of, batch_of_rows
from moeyard.moe.config.moe import MoEConfig
from moeyard.moe.models.decoder import Decoder
from moeyard.moe.models.initialize import initialize
from moeyard.moe.routers.averaged import AveragedConfig
from moeyard.moe.routers.draws import sequence_keys
from moeyard.moe.routers.routing import RouterInput, count_choices
from moeyard.moe.routers.table import ROUTERS, router

from router_cases import ACTIVATIONS, CASES, NOT_FOR_TEXT, NOT_TENSORS_ALONE
from small_model import CONFIG, write_decoder

D, E, VOCABULARY = 24, 4, 257
OF_TEXT = [name for name in CASES if name not in NOT_FOR_TEXT]
every_router = pytest.mark.parametrize("name", CASES)
every_router_of_text = pytest.mark.parametrize("name", OF_TEXT)


def module(name: str) -> moeyard.Router:
    """Return a layer's router, which knows its experts."""
    torch.manual_seed(0)
    config = router(**CASES[name])
    options = {"activation": activation(name), "vocab_size": VOCABULARY, "layer": 3}
    layer = moeyard.MoELayer(D, 20, E, config, **options)
    layer.gate.experts_changed()
    return layer.gate


def activation(name: str) -> str:
    return ACTIVATIONS.get(name, "swiglu")


def rows(lengths=(7, 5, 9), seed=1, dtype=torch.float32) -> RouterInput:
    """Rows of some sequences, with all that a router may read."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    ids_T = torch.randint(0, VOCABULARY, (total,), generator=generator)
    return RouterInput(
        x_TD=torch.randn(total, D, generator=generator).to(dtype),
        ids_T=ids_T,
        positions_T=torch.cat([torch.arange(length) for length in (0, *lengths)]),
        lengths=lengths,
        tasks_T=torch.randint(0, 2, (total,), generator=generator),
        timesteps_T=torch.randint(0, 1000, (total,), generator=generator),
        draw_keys=sequence_keys(ids_T, lengths),
    )


def decoder_of(name: str, seed: int = 5) -> Decoder:
    moe = MoEConfig(
        num_experts=E, d_expert=20, activation=activation(name), router=router(**CASES[name])
    )
    decoder = Decoder(CONFIG.model_copy(update={"moe": moe}))
    initialize(decoder, seed)
    return decoder


def train(decoder: Decoder, steps: int = 3) -> list[torch.Tensor]:
    """Take some steps on random ids; return the losses."""
    layers = [layer for _, layer in decoder.moe_layers()]
    optimizer = torch.optim.SGD(decoder.parameters(), 0.1)
    losses = []
    for step in range(steps):
        ids_BL = torch.randint(0, 250, (3, 12), generator=torch.Generator().manual_seed(step))
        output = decoder.train()(batch_of_rows(ids_BL))
        logits_TV = decoder.logits(output.hidden_TD)
        loss = torch.nn.functional.cross_entropy(logits_TV, ids_BL.flatten().roll(-1))
        loss = loss + moeyard.auxiliary_loss(layers, output.routings)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        moeyard.after_step(layers, [output.routings])
        losses.append(loss.detach())
    return losses


def test_every_router_has_a_case():
    assert {section["kind"] for section in CASES.values()} == {c().kind for c in ROUTERS}


@every_router
@pytest.mark.parametrize("training", [True, False])
def test_counts_are_those_of_the_choices(name, training):
    gate, given = module(name).train(training), rows()
    routing = gate.route(given)
    assert routing.experts_TK.dtype == torch.int32 and routing.weights_TK.isfinite().all()
    assert routing.experts_TK.shape == routing.weights_TK.shape
    assert torch.equal(routing.counts_E, count_choices(routing.experts_TK, E))
    assert int(routing.num_tokens) == len(given.x_TD)
    for chosen in routing.experts_TK.tolist():
        ids = [expert for expert in chosen if expert >= 0]
        assert len(set(ids)) == len(ids) and all(expert < E for expert in ids)
    is_average = isinstance(gate.config, AveragedConfig) and not training  # no row visits experts
    if not gate.config.varies and not is_average:
        dropped = routing.extra_counts.get("dropped", torch.tensor(0))
        assert int(routing.counts_E.sum() + dropped) == len(given.x_TD) * gate.k


@every_router
@pytest.mark.parametrize("training", [True, False])
def test_rows_that_are_not_valid_are_not_routed(name, training):
    given = rows((7, 5))
    valid_T = torch.tensor([True] * 6 + [False] + [True] * 4 + [False])
    gate = module(name).train(training)
    routing = gate.route(dataclasses.replace(given, valid_T=valid_T))
    assert (routing.experts_TK[~valid_T] == -1).all() and int(routing.num_tokens) == 10
    assert torch.equal(routing.counts_E, count_choices(routing.experts_TK, E))


@every_router
@pytest.mark.parametrize("training", [True, False])
def test_a_rank_without_rows_routes_nothing(name, training):
    routing = module(name).train(training).route(rows(()))
    assert len(routing.experts_TK) == 0 and int(routing.counts_E.sum()) == 0


@every_router
@pytest.mark.parametrize("training", [True, False])
def test_its_own_choice_replays_with_the_same_bits_or_is_refused(name, training):
    gate, given = module(name).train(training), rows()
    chosen = gate.route(given)
    if training and name.startswith("local_search"):
        with pytest.raises(ConfigError, match="routers cannot replay recorded routes"):
            gate.route_to(given, chosen.experts_TK)
        return
    replayed = gate.route_to(given, chosen.experts_TK)
    for field in dataclasses.fields(chosen):
        wanted, found = getattr(chosen, field.name), getattr(replayed, field.name)
        if isinstance(wanted, dict):
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[key], wanted[key]) for key in wanted)
        else:
            assert torch.equal(found, wanted), field.name
    other = gate.route_to(given, torch.where(chosen.experts_TK == 0, -1, chosen.experts_TK))
    assert int(other.counts_E[0]) == 0 and torch.equal(other.counts_E[1:], chosen.counts_E[1:])


@every_router
def test_autocast_changes_no_choice(name):
    gate, given = module(name).train(), rows(dtype=torch.bfloat16)
    plain = gate.route(given)
    with torch.autocast("cpu", torch.bfloat16):
        cast = gate.route(given)
    assert torch.equal(plain.experts_TK, cast.experts_TK)
    assert torch.equal(plain.weights_TK, cast.weights_TK)


@every_router
def test_a_training_step_draws_the_same_again_and_the_next_one_differs_only_if_it_draws(name):
    gate, given = module(name).train(), rows()
    first, again = gate.route(given), gate.route(given)
    assert torch.equal(first.experts_TK, again.experts_TK)
    assert torch.equal(first.weights_TK, again.weights_TK)
    other = gate.route(dataclasses.replace(given, draw_keys=(1, 2, 3)))
    same = torch.equal(first.weights_TK, other.weights_TK) and torch.equal(
        first.experts_TK, other.experts_TK
    )
    assert same == (not gate.config.draws())


@every_router
def test_a_sequence_is_routed_alike_alone_and_in_a_batch(name):
    gate, given = module(name).train(), rows((7, 5))
    whole, parts = gate.route(given), []
    for first, last, index in ((0, 7, 0), (7, 12, 1)):
        part = {
            field.name: getattr(given, field.name)[first:last]
            for field in dataclasses.fields(given)
            if field.name.endswith(("_T", "_TD")) and getattr(given, field.name) is not None
        }
        keys = (given.draw_keys[index],)
        parts.append(gate.route(RouterInput(**part, lengths=(last - first,), draw_keys=keys)))
    for token in range(12):
        alone, row = (parts[0], token) if token < 7 else (parts[1], token - 7)
        assert pairs(whole, token) == pytest.approx(pairs(alone, row), abs=1e-6)


def pairs(routing, row) -> dict[int, float]:
    ids, weights = routing.experts_TK[row].tolist(), routing.weights_TK[row].tolist()
    return {expert: weight for expert, weight in zip(ids, weights, strict=True) if expert >= 0}


@every_router
def test_a_rule_of_tensors_alone_compiles_to_one_graph(name):
    gate, given = module(name).eval(), rows()
    if gate.config.varies or name in NOT_TENSORS_ALONE:
        pytest.skip("its rule looks at values on the host")
    route = torch.compile(gate.route, backend="eager", fullgraph=True)
    compiled, plain = route(given), gate.route(given)
    assert torch.equal(compiled.experts_TK, plain.experts_TK)
    torch.testing.assert_close(compiled.weights_TK, plain.weights_TK)


@every_router_of_text
def test_training_moves_every_parameter_of_a_router_that_learns(name):
    decoder = decoder_of(name)
    routers = decoder.routers()
    before = [[p.detach().clone() for p in gate.parameters()] for gate in routers]
    losses = train(decoder)
    assert all(loss.isfinite() for loss in losses)
    for gate, earlier in zip(routers, before, strict=True):
        moved = [not torch.equal(a, b) for a, b in zip(earlier, gate.parameters(), strict=True)]
        assert all(moved) and bool(moved) == gate.config.learns


@every_router_of_text
def test_a_trained_model_exports_decodes_and_may_be_offloaded(name, tmp_path):
    decoder = decoder_of(name)
    train(decoder)
    decoder.eval()
    write_decoder(tmp_path / "m", decoder, eos_id=256)
    model = moeyard.load(tmp_path / "m")
    ids_BT = torch.randint(0, 250, (1, 14), generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        expected = decoder.logits(decoder(batch_of_rows(ids_BT)).hidden_TD)
    logits = model(ids_BT)
    torch.testing.assert_close(logits[0], expected, rtol=1e-5, atol=1e-5)
    offloaded = moeyard.load(tmp_path / "m", expert_memory="50%")
    assert torch.equal(offloaded(ids_BT), logits)
    if decoder.config.moe.router.why_not_causal():
        with pytest.raises(ConfigError, match="cannot continue a text"):
            model.generate(ids_BT, max_new_tokens=2)
        return
    cache = decoder.new_cache(14)
    with torch.no_grad():
        steps = [decoder(batch_of([ids], [cache])).hidden_TD for ids in ids_BT[0].split(1)]
    torch.testing.assert_close(decoder.logits(torch.cat(steps)), expected, rtol=1e-4, atol=1e-4)
    answer = model.generate(ids_BT, max_new_tokens=4, temperature=0)
    assert torch.equal(offloaded.generate(ids_BT, max_new_tokens=4, temperature=0), answer)
