"""Routers that are fitted to rows: what they say, their file, and the command that writes it."""

import json

import pytest
import torch

import moeyard
from moeyard.cli import main
from moeyard.errors import ConfigError
from moeyard.serving.experts.predictors import fit_gates as fitting
from moeyard.serving.experts.predictors.admission import order_of
from moeyard.serving.experts.predictors.fit_gates import fit_gates, judge_gates, num_steps, pieces
from moeyard.serving.experts.predictors.fitted_gates import open_fitted_gates, save
from moeyard.serving.experts.predictors.gate_maps import plain_maps, router_logits
from moeyard.serving.experts.predictors.next_gates import NextGates
from moeyard.serving.experts.predictors.predictor import PredictorFacts
from moeyard.serving.experts.predictors.switch import AlwaysOn
from moeyard.serving.experts.predictors.table import facts_of
from moeyard.serving.loading import open_model

from small_model import slots, write_random_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("fitted") / "model"
    write_random_model(path)
    return path


@pytest.fixture(scope="module")
def model(folder):
    return open_model(folder)[0]


@pytest.fixture(scope="module")
def texts():
    ids = torch.randint(0, 257, (600,), generator=torch.Generator().manual_seed(0)).tolist()
    return pieces(ids, 64)


@pytest.fixture(scope="module")
def fitted(model, texts):
    return fit_gates(facts_of(model.config), model.decoder, texts)


@torch.no_grad()
def errors(model, maps, texts):
    """Return the mean square error of each map's logits for the layer after it."""
    gates = [layer.gate for _, layer in model.decoder.moe_layers()]
    sums = torch.zeros(len(gates))
    for ids_T in texts:
        read = fitting._read(model.decoder, ids_T)
        sources = (read.inputs_LND[0], *read.rows_LND[:-1])
        for place, (x_ND, own) in enumerate(zip(sources, (maps.input, *maps.layers), strict=True)):
            true_NE = router_logits(gates[place], read.rows_LND[place])
            said_NE = 0.0 if own is None else own.logits(x_ND)[:, 0]
            sums[place] += (said_NE - true_NE).square().mean() / len(texts)
    return sums


def test_fitted_routers_are_nearer_to_the_true_scores_than_plain_ones(model, fitted, texts):
    plain = plain_maps(facts_of(model.config), model.decoder)
    assert (errors(model, fitted, texts) < errors(model, plain, texts)).all()


def test_a_fit_in_several_passes_is_the_same_and_reports_each_piece(
    model, fitted, texts, monkeypatch
):
    facts, reports = facts_of(model.config), []
    monkeypatch.setattr(fitting, "BYTES_AT_ONCE", 1)
    again = fit_gates(facts, model.decoder, texts, lambda: reports.append(None))
    expected = num_steps(facts, model.decoder, len(texts))
    assert len(reports) == expected == len(texts) * len(facts.moe_layers)
    for one, other in zip(
        (fitted.input, *fitted.layers), (again.input, *again.layers), strict=True
    ):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_saved_fit_says_the_same(model, fitted, texts, tmp_path):
    facts = facts_of(model.config)
    save(tmp_path / "g", facts, fitted)
    opened = open_fitted_gates(tmp_path / "g", facts, model.decoder)
    assert opened.reads_input
    ours = judge_gates(facts, model.decoder, texts, NextGates(facts, model.decoder, fitted))
    theirs = judge_gates(facts, model.decoder, texts, opened)
    for one, other in zip(ours, theirs, strict=True):  # the file has bf16
        assert one.recall == pytest.approx(other.recall, abs=0.05) and one.needed == other.needed


def test_files_that_do_not_fit_are_refused_in_one_sentence(model, fitted, tmp_path):
    facts = facts_of(model.config)
    save(tmp_path / "g", facts, fitted)
    other = PredictorFacts(facts.moe_layers, facts.num_experts, facts.k, "another one")
    with pytest.raises(ConfigError, match="belongs to another model: architecture"):
        open_fitted_gates(tmp_path / "g", other, model.decoder)
    cut = fitted._replace(input=fitted.input._replace(weight_RD=fitted.input.weight_RD[:-1]))
    save(tmp_path / "cut", facts, cut)
    with pytest.raises(ConfigError, match=r"fitted_gates:.* is damaged"):
        open_fitted_gates(tmp_path / "cut", facts, model.decoder)
    with pytest.raises(ConfigError, match=r"cannot be read \(.*that moeyard trace gates wrote"):
        open_fitted_gates(tmp_path / "nothing", facts, model.decoder)


def test_answers_are_those_without_it_and_hints_come_before_the_first_layer(
    folder, model, fitted, tmp_path
):
    facts = facts_of(model.config)
    save(tmp_path / "g", facts, fitted)
    spec = f"fitted_gates:{tmp_path / 'g'}"
    options = moeyard.serving.experts.options.StoreOptions(predictor=spec)
    offloaded, store = open_model(folder, expert_memory=slots(4), options=options)
    store._ahead._switch = AlwaysOn()
    ids = torch.arange(7).unsqueeze(0)
    arguments = {"max_new_tokens": 12, "temperature": 0}
    assert torch.equal(offloaded.generate(ids, **arguments), model.generate(ids, **arguments))
    traffic = store.statistics.hint_traffic
    assert traffic[0].hinted > 0 and traffic[0].right > 0, "from the embeddings"
    assert traffic[1].hinted > 0


def test_likely_hints_go_by_layers_and_unlikely_ones_come_last():
    hints = {"far": (0.9, 3), "near": (0.6, 1), "unlikely": (0.3, 1), "best of near": (0.8, 1)}
    order = sorted(hints, key=lambda name: order_of(*hints[name]))
    assert order == ["best of near", "near", "far", "unlikely"]


def test_trace_gates_writes_a_predictor_that_loads(folder, model, tmp_path, capsys):
    text, out = tmp_path / "text.txt", tmp_path / "g"
    text.write_text("".join(chr(97 + number * number % 26) for number in range(900)))
    command = ["trace", "gates", str(folder), "--text", str(text), "-o", str(out)]
    assert main([*command, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["learned_tokens"], values["held_out_tokens"]) == (810, 90)
    for recalls in values["predictors"].values():
        assert all(0 < r["right"] <= min(r["needed"], r["hinted"]) for r in recalls)
    offloaded = moeyard.load(folder, expert_memory=slots(4), expert_predictor=f"fitted_gates:{out}")
    ids = torch.arange(20).unsqueeze(0)
    assert torch.equal(offloaded(ids), model(ids))
    assert main([*command, "--tokens", "-5"]) == 2
    assert "--tokens is -5; use 1 or more" in capsys.readouterr().err
    assert main([*command[:-1], str(tmp_path / "none" / "g")]) == 2
    assert "which cannot be written (No such file or directory)" in capsys.readouterr().err
    text.write_text("a")
    assert main(command) == 2
    assert "give a longer text" in capsys.readouterr().err
