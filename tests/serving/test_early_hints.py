"""Hints for models whose routers choose early: of layers that have not chosen yet."""

import pytest
import torch

from moeyard.errors import ConfigError
from moeyard.moe.models.decoder import Decoder
from moeyard.moe.models.initialize import initialize
from moeyard.moe.routers.topk import TopK
from moeyard.serving.experts.options import StoreOptions
from moeyard.serving.experts.predictors import fit_gates as fitting
from moeyard.serving.experts.predictors.fit_gates import fit_gates, judge_gates, pieces
from moeyard.serving.experts.predictors.fitted_gates import save
from moeyard.serving.experts.predictors.gate_maps import plain_maps, router_logits
from moeyard.serving.experts.predictors.next_gates import NextGates
from moeyard.serving.experts.predictors.switch import AlwaysOn
from moeyard.serving.experts.predictors.table import facts_of, open_predictor
from moeyard.serving.loading import open_model

from small_model import slots, with_router, write_decoder

FIRST = {"ffn_input": 1, "attention_input": 1, "previous_block": 2}
"""How far ahead the first layer is that has not chosen when a layer's experts run."""


def decoder_of(lookahead):
    config = with_router(TopK(k=2, lookahead=lookahead))
    decoder = Decoder(config.model_copy(update={"num_layers": 6, "dense_layers": (1,)}))
    initialize(decoder, 5)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in decoder.named_parameters():
        if "lm_head" in name or "embed" in name:
            parameter.data *= 20
        if "norm" in name:
            parameter.data = torch.rand(parameter.shape, generator=generator) + 0.5
    return decoder


@pytest.fixture(scope="module", params=FIRST)
def lookahead(request):
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory, lookahead):
    path = tmp_path_factory.mktemp("early") / "model"
    write_decoder(path, decoder_of(lookahead), eos_id=256)
    return path


@pytest.fixture(scope="module")
def texts():
    ids = torch.randint(0, 257, (600,), generator=torch.Generator().manual_seed(0)).tolist()
    return pieces(ids, 64)


def test_where_layers_change_nothing_the_next_choices_are_foretold_exactly(lookahead, texts):
    decoder = decoder_of(lookahead)
    for name, parameter in decoder.named_parameters():
        if "o_proj" in name or "down" in name or "fc2" in name:
            parameter.data.zero_()
    facts = facts_of(decoder.config)
    found = judge_gates(facts, decoder, texts, NextGates(facts, decoder))
    assert found[0].distance == FIRST[lookahead]
    assert all(recall.right == min(recall.needed, recall.hinted) > 0 for recall in found)


@torch.no_grad()
def errors(decoder, maps, texts):
    """Return the mean square error of each layer's map for the next layer that has not chosen."""
    facts = facts_of(decoder.config)
    gates = [layer.gate for _, layer in decoder.moe_layers()]
    sums = torch.zeros(len(maps.layers))
    for ids_T in texts:
        read = fitting._read(decoder, ids_T)
        for place, own in enumerate(maps.layers):
            target = place + 1 + facts.known
            rows_ND = read.gate_rows(target, gates[target].lookahead)
            said_NE = own.logits(read.rows_LND[place])[:, 0]
            sums[place] += (said_NE - router_logits(gates[target], rows_ND)).square().mean()
    return sums


def test_fitted_routers_are_nearer_to_the_true_scores(lookahead, texts):
    decoder = decoder_of(lookahead)
    facts = facts_of(decoder.config)
    plain, fitted = plain_maps(facts, decoder), fit_gates(facts, decoder, texts)
    assert len(fitted.layers) == len(facts.moe_layers) - FIRST[lookahead] > 1
    assert (errors(decoder, fitted, texts) < errors(decoder, plain, texts)).all()


def test_answers_are_those_without_hints(folder, lookahead, texts, tmp_path):
    resident, _ = open_model(folder)
    facts = facts_of(resident.config)
    save(tmp_path / "g", facts, fit_gates(facts, resident.decoder, texts))
    ids = torch.arange(7).unsqueeze(0)
    arguments = {"max_new_tokens": 16, "temperature": 0}
    expected = resident.generate(ids, **arguments)
    for spec in ("next_gates", f"fitted_gates:{tmp_path / 'g'}"):
        options = StoreOptions(predictor=spec)
        model, store = open_model(folder, expert_memory=slots(8), options=options)
        store._ahead._switch = AlwaysOn()
        assert torch.equal(model.generate(ids, **arguments), expected)
        traffic = store.statistics.hint_traffic
        assert traffic[FIRST[lookahead]].right > 0
        assert FIRST[lookahead] == 1 or 1 not in traffic, "what is known is not foretold"
        assert store.counts().expected == 0


def test_a_wrong_hint_ends_when_the_layer_has_chosen(folder, lookahead):
    """That is before the layer runs, where routers choose early."""
    options = StoreOptions(predictor="next_gates")
    model, store = open_model(folder, expert_memory=slots(30), options=options)
    store._ahead._switch = AlwaysOn()
    layers = dict(model.decoder.moe_layers())
    announced = []

    def watch(layer, experts):
        announced.append(layer)
        prefetch(layer, experts)
        assert layer not in store._ahead._given

    prefetch, store.prefetch = store.prefetch, watch
    model.generate(torch.arange(3).unsqueeze(0), 8, temperature=0)
    assert bool(announced) == (lookahead != "ffn_input")
    assert set(announced) <= set(layers)


def test_predictors_by_routes_are_refused_where_the_next_layer_is_known(folder, lookahead):
    decoder = open_model(folder)[0].decoder
    if lookahead == "previous_block":
        with pytest.raises(ConfigError, match="is previous_block, so the next layer's experts"):
            open_predictor("previous_layers", decoder)
    else:
        assert open_predictor("previous_layers", decoder) is not None
