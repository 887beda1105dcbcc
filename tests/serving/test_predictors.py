"""Predictors: what they say, what they learn, and one sentence where they do not fit."""

import json
import random

import numpy as np
import pytest
import torch

import moeyard
from moeyard.cli import main
from moeyard.errors import ConfigError
from moeyard.moe.batch import batch_of
from moeyard.moe.config.kinds import read_model
from moeyard.moe.routers.hash import Hash
from moeyard.moe.routers.topk import TopK
from moeyard.moe.routes.reader import RouteFile
from moeyard.moe.routes.recorder import recording
from moeyard.moe.routes.rows import Phase, Routes
from moeyard.serving.experts.forwards import Forward
from moeyard.serving.experts.predictors import fit as fitting
from moeyard.serving.experts.predictors.activations import Activations
from moeyard.serving.experts.predictors.next_gates import NextGates
from moeyard.serving.experts.predictors.predictor import PredictorFacts
from moeyard.serving.experts.predictors.previous_layers import PreviousLayers
from moeyard.serving.experts.predictors.previous_token import PreviousToken
from moeyard.serving.experts.predictors.recall import judge, judge_column, split
from moeyard.serving.experts.predictors.replay import hints_of, learn
from moeyard.serving.experts.predictors.switch import (
    FIRST_RETEST,
    PLAN,
    SOONEST_RETEST,
    WARM_UP,
    AlwaysOn,
    MeasuringSwitch,
)
from moeyard.serving.experts.predictors.table import check_fit, facts_of, open_predictor
from moeyard.serving.experts.predictors.trained import Trained, read, save
from moeyard.serving.experts.recorded import read_forwards
from moeyard.serving.loading import open_model

from small_images import VIT
from small_model import slots, with_router, write_random_model
from small_series import MOIRAI, TIME_MOE

FACTS = PredictorFacts((0, 1, 3), 8, 2, "this one")
NEXT = np.random.default_rng(0).permutation(8)


def routes_by_rule(num_sequences=12, rows=40, seed=0):
    """Return routes where a layer's experts follow from the layer's before, by a permutation."""
    chance = np.random.default_rng(seed)
    first_NK = np.stack([chance.permutation(8)[:2] for _ in range(num_sequences * rows)])
    layers = [first_NK, NEXT[first_NK], NEXT[NEXT[first_NK]]]
    number = num_sequences * rows
    return Routes(
        tokens_N=np.zeros(number, np.int32),
        sequences_N=np.repeat(np.arange(num_sequences), rows),
        positions_N=np.tile(np.arange(rows, dtype=np.int32), num_sequences),
        steps_N=np.arange(number),
        phases_N=np.full(number, Phase.DECODE, np.uint8),
        experts_NLK=np.stack(layers, axis=1).astype(np.int32),
    )


def named(hints, layer):
    return [expert for (at, expert), _ in hints if at == layer]


def one_row(sequence=0):
    return Forward((sequence,), (Phase.DECODE,), (1,))


def test_previous_layers_learns_which_experts_follow_which():
    learned, held = split(routes_by_rule(), 0.5)
    predictor = PreviousLayers(FACTS)
    learn(predictor, learned, FACTS)
    recalls = {(r.distance, r.width): r.recall for r in judge(predictor, held, FACTS, 100)}
    assert recalls[1, 2] > 0.75 and recalls[2, 2] > 0.75, "by chance 0.25"
    empty = judge(PreviousLayers(FACTS), held.select(slice(0, 2)), FACTS, 2)
    assert all(recall.recall < 0.9 for recall in empty), "nothing was learned yet"


def test_previous_token_names_what_the_last_tokens_of_the_sequence_visited_latest_first():
    predictor = PreviousToken(FACTS)
    for experts in ([5, 6], [1, 2]):
        predictor.begin(one_row())
        for layer in FACTS.moe_layers:
            predictor.see(layer, np.array([experts]))
    first = predictor.begin(one_row())
    assert sorted(named(first, 0)[:2]) == [1, 2] and sorted(named(first, 0)[2:]) == [5, 6]
    assert predictor.begin(one_row(sequence=1)) == [], "another sequence visited nothing"
    predictor.begin(one_row())
    predictor.see(0, np.array([[3, 4]]))
    assert sorted(named(predictor.after_choice(0, None), 1)[:2]) == [1, 2]


def test_activations_find_the_sequence_that_went_the_same_way():
    predictor = Activations(FACTS)
    ways = ([[0, 1], [2, 3], [4, 5]], [[6, 7], [4, 5], [0, 1]])
    for number, way in enumerate(ways):
        for _ in range(2):  # collected when the next piece begins
            predictor.begin(Forward((number,), (Phase.PREFILL,), (64,)))
            for layer, experts in zip(FACTS.moe_layers, way, strict=True):
                predictor.see(layer, np.array([experts] * 64))
    for way in ways:
        predictor.begin(one_row(sequence=9 + way[0][0]))
        predictor.see(0, np.array([way[0]]))
        hints = predictor.after_choice(0, None)
        assert sorted(named(hints, 1)) == way[1]
        scores = {key[0]: score for key, score in hints}
        assert scores[1] == pytest.approx(3 / 4, rel=1e-3), "(p + 1e-8) (1 - 1 / (L + 1))"
        assert scores[3] == pytest.approx(2 / 4, rel=1e-3)


def test_a_trained_network_knows_the_rule_and_comes_back_from_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr(fitting, "STEPS", 120)
    learned, held = split(routes_by_rule(), 0.5)
    arrays = fitting.fit(FACTS, learned)
    save(tmp_path / "p", FACTS, arrays)
    assert [path.name for path in tmp_path.iterdir()] == ["p"]
    found = judge(Trained(FACTS, read(tmp_path / "p", FACTS)), held, FACTS, 100)
    assert found == judge(Trained(FACTS, arrays), held, FACTS, 100)
    assert found[0].distance == 1 and found[0].recall > 0.95


def test_the_same_routes_give_the_same_network(monkeypatch):
    monkeypatch.setattr(fitting, "STEPS", 2)
    first, second = (fitting.fit(FACTS, routes_by_rule()) for _ in range(2))
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_files_of_others_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(fitting, "STEPS", 1)
    path = tmp_path / "p"
    save(path, FACTS, fitting.fit(FACTS, routes_by_rule()))
    other = PredictorFacts((0, 1, 3), 8, 2, "another one")
    with pytest.raises(ConfigError, match="belongs to another model: architecture is this one"):
        read(path, other)
    with pytest.raises(ConfigError, match=r"nothing cannot be read \("):
        read(tmp_path / "nothing", FACTS)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ConfigError, match="cannot be read"):
        read(path, FACTS)


def test_next_gates_are_the_routers_of_the_next_layers(model_folder):
    """Where nothing changes between two layers, the first choice foretells the second exactly."""
    model, _ = open_model(model_folder)
    facts = facts_of(model.config)
    _, (second_index, second) = model.decoder.moe_layers()
    norms = [model.decoder.layers[i].post_attention_layernorm for i in facts.moe_layers]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for norm in norms:
            norm.weight.copy_(torch.rand(24, generator=generator) + 0.5)
    gates = NextGates(facts, model.decoder)
    residual_ND = torch.randn(5, 24, generator=generator)
    with torch.inference_mode():
        best_NSE = gates.best(0, norms[0](residual_ND), 6)
        expected_NE = second.gate.logits(norms[1](residual_ND))
        assert np.array_equal(best_NSE[:, 0], expected_NE.argsort(dim=1, descending=True))
        hints = gates.after_choice(0, norms[0](residual_ND[:1]))
    best = expected_NE[0].argsort(descending=True)[:4].tolist()
    assert named(hints, second_index) == best
    assert hints[1].score == pytest.approx(0.5), "the K-th expert is as likely as not"


def test_a_run_that_asks_the_gates_writes_a_column_with_what_they_named(model_folder, tmp_path):
    model, store = open_model(model_folder, expert_memory=slots(4))
    facts = facts_of(model.config)
    store.predict(NextGates(facts, model.decoder), facts, AlwaysOn())
    with recording(model.decoder, tmp_path / "a.routes", own=store.hint_column()):
        model.generate(torch.arange(1).unsqueeze(0), 12, temperature=0)
    routes = RouteFile(tmp_path / "a.routes").read()
    widest = {recall.distance: recall for recall in judge_column(routes, facts)}[1]
    counted = store.statistics.hint_traffic[1]
    assert (widest.hinted, widest.right) == (counted.hinted, counted.right)
    assert widest.needed == counted.needed == 2 * len(routes) and widest.right > 0


def test_hints_of_recorded_routes_are_those_of_the_run(model_folder, tmp_path):
    model, store = open_model(model_folder, expert_memory=slots(4))
    facts, said = facts_of(model.config), []

    class Noted(PreviousLayers):
        def after_choice(self, layer, x_ND):
            said.append(super().after_choice(layer, x_ND))
            return said[-1]

    predictor = Noted(facts)
    model.decoder.register_forward_pre_hook(lambda *_: said.append("forward"))
    store.predict(predictor, facts, AlwaysOn())
    with recording(model.decoder, tmp_path / "a.routes"):
        model.generate(torch.arange(5).unsqueeze(0), 6, temperature=0)
    forwards = read_forwards([RouteFile(tmp_path / "a.routes")])
    replayed = []
    for found in hints_of(PreviousLayers(facts), forwards, facts):
        replayed += ["forward", *found.after]
    assert replayed == said and len(said) == 6 * 3


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "magic",
            "expert_predictor is 'magic'; use one of auto, none, next_gates, fitted_gates:FILE, ",
        ),
        ("trained", "which needs a file: trained:FILE"),
        ("next_gates:x", "but next_gates takes no file; leave it out"),
        ("trained:nowhere", "trained:nowhere cannot be read"),
    ],
)
def test_specs_that_cannot_work_are_refused_in_one_sentence(model_folder, spec, message):
    with pytest.raises(ConfigError) as raised:
        moeyard.load(model_folder, expert_memory="50%", expert_predictor=spec)
    assert message in str(raised.value)


def test_routers_that_choose_by_tokens_take_no_predictor_and_auto_knows_it(tmp_path):
    write_random_model(tmp_path / "m", with_router(Hash(k=2)))
    model, _ = open_model(tmp_path / "m")
    assert open_predictor("auto", model.decoder) is None
    with pytest.raises(ConfigError, match="the router chooses by tokens"):
        open_predictor("next_gates", model.decoder)


def test_a_route_file_of_another_model_teaches_nothing(model_folder, tmp_path):
    write_random_model(tmp_path / "m", with_router(TopK(k=1)))
    other, _ = open_model(tmp_path / "m")
    with recording(other.decoder, tmp_path / "a.routes"):
        other.decoder(batch_of([torch.arange(5)]))
    model, _ = open_model(model_folder)
    with pytest.raises(ConfigError, match="belongs to another model: architecture is"):
        open_predictor(f"previous_layers:{tmp_path / 'a.routes'}", model.decoder)


def test_trace_predict_prints_recalls_and_writes_a_predictor_that_loads(
    model_folder, tmp_path, monkeypatch, capsys
):
    model, _ = open_model(model_folder)
    with recording(model.decoder, tmp_path / "a.routes"):
        for seed in range(4):
            ids = torch.randint(0, 257, (12,), generator=torch.Generator().manual_seed(seed))
            model.decoder(batch_of([ids]))
    monkeypatch.setattr(fitting, "STEPS", 3)
    save_to = ["--save", str(tmp_path / "p"), "--json"]
    assert main(["trace", "predict", str(tmp_path / "a.routes"), *save_to]) == 0
    values = json.loads(capsys.readouterr().out)
    nowhere = ["--save", str(tmp_path / "none" / "p")]
    assert main(["trace", "predict", str(tmp_path / "a.routes"), *nowhere]) == 2
    assert "which cannot be written (No such file or directory)" in capsys.readouterr().err
    assert values["learned_rows"] == values["held_out_rows"] == 24
    assert set(values["predictors"]) == {
        *("previous_token", "previous_layers", "activations", "trained"),
    }
    for recalls in values["predictors"].values():
        assert all(r["right"] <= min(r["needed"], r["hinted"]) for r in recalls)
    spec = f"trained:{tmp_path / 'p'}"
    offloaded = moeyard.load(model_folder, expert_memory=slots(4), expert_predictor=spec)
    ids = torch.arange(20).unsqueeze(0)
    assert torch.equal(offloaded(ids), model(ids))


def drive(switch, number, seconds_of, rows=1, reads=3):
    """Run forwards; return for each whether it read ahead."""
    found = []
    for _ in range(number):
        found.append(switch.begin(rows))
        switch.end(seconds_of(found[-1]), reads)
    return found


def test_the_switch_keeps_what_pays_and_drops_what_does_not():
    test_end = WARM_UP + len(PLAN)
    pays = drive(MeasuringSwitch(), test_end + 20, lambda ahead: 0.8 if ahead else 1.0)
    assert not any(pays[:WARM_UP]) and tuple(pays[WARM_UP:test_end]) == PLAN
    assert all(pays[test_end:])
    same = drive(MeasuringSwitch(), test_end + 20, lambda ahead: 0.99 if ahead else 1.0)
    assert not any(same[test_end:]), "less than the margin is not worth it"


def test_the_switch_does_not_believe_noise():
    chance, kept = random.Random(0), 0
    for _ in range(200):
        switch = MeasuringSwitch()
        drive(switch, WARM_UP + len(PLAN), lambda _: chance.uniform(0.5, 1.5))
        kept += switch.begin(1)
    assert kept <= 10, "one of twenty at most, although nothing differs"


def test_the_switch_costs_less_than_two_percent_where_reading_ahead_is_half_as_fast():
    seconds = []

    def seconds_of(ahead):
        seconds.append(2.0 if ahead else 1.0)
        return seconds[-1]

    drive(MeasuringSwitch(), 300, seconds_of)
    assert sum(seconds) < 1.02 * len(seconds)


def test_the_switch_tests_again_rarely_and_when_much_changes():
    switch = MeasuringSwitch()
    drive(switch, WARM_UP + len(PLAN), lambda ahead: 1.0)
    assert not any(drive(switch, 2 * FIRST_RETEST - 1, lambda ahead: 1.0))
    assert any(drive(switch, 20, lambda ahead: 1.0))
    drive(switch, len(PLAN), lambda ahead: 1.0)
    assert any(drive(switch, SOONEST_RETEST + 20, lambda ahead: 1.0, reads=30))


def test_sizes_of_forwards_are_judged_apart_and_full_memory_is_not_tested():
    switch = MeasuringSwitch()
    slow = {False: 1.0, True: 2.0}
    drive(switch, 60, lambda ahead: 0.5 if ahead else 1.0, rows=1)
    drive(switch, 60, slow.get, rows=200)
    assert switch.begin(1) and not switch.begin(200)
    assert not any(drive(MeasuringSwitch(), 200, lambda ahead: 1.0, reads=0))


@pytest.mark.parametrize("model", [VIT, TIME_MOE, MOIRAI], ids=lambda model: model["kind"])
def test_models_that_continue_no_texts_have_no_predictor(model):
    config = read_model(model)
    assert check_fit("auto", config) == "none"
    message = "and predictors are for models that continue texts; use auto or none"
    with pytest.raises(ConfigError, match=f"the model is of kind {model['kind']}, {message}"):
        check_fit("previous_token", config)
