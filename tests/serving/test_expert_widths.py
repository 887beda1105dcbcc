"""Which experts get few bits: the least important first, as many as the tolerance allows."""

import json

import pytest
import torch
from mixed_model import KEYS, wide_config

from moeyard.cli import main
from moeyard.errors import ConfigError, DataError, ModelFileError
from moeyard.moe.folders.convert import convert
from moeyard.moe.folders.folder import ModelFolder
from moeyard.moe.folders.prices import read_prices
from moeyard.serving.evaluation.held_out_text import score_text
from moeyard.serving.loading import load
from moeyard.serving.widths.convert import convert_mixed
from moeyard.serving.widths.importance import measure_importance
from moeyard.serving.widths.search import most_narrow
from moeyard.serving.widths.weights import NarrowSome, round_experts

from small_model import write_random_model

FEWEST_TOKENS = 256
ORDER = [(0, expert) for expert in range(37)]


@pytest.fixture(autouse=True)
def short_texts(monkeypatch):
    monkeypatch.setattr("moeyard.serving.widths.convert.FEWEST_TOKENS", FEWEST_TOKENS)


def search(costs, limit):
    """Search with a perplexity of 1 plus the costs of what is narrow; return the steps too."""
    steps = []
    found = most_narrow(
        ORDER, lambda keys: 1 + sum(costs[key] for key in keys), limit, steps.append
    )
    return found, steps


@pytest.mark.parametrize("number", [0, 1, 18, 36, 37])
def test_the_search_finds_the_largest_number_within_the_limit(number):
    costs = dict.fromkeys(ORDER, 2.0 ** (-8))
    found, steps = search(costs, 1 + number * 2.0**-8)
    assert found.num_narrow == number and found.is_within
    assert len(steps) <= 2 + 6 and found in steps


def test_the_search_narrows_the_first_and_never_exceeds_the_limit():
    costs = {key: 0.01 * (-1) ** key[1] * key[1] for key in ORDER}  # up and down
    asked = []
    limit = 1.05
    found = most_narrow(
        ORDER,
        lambda keys: asked.append(keys) or 1 + sum(costs[key] for key in keys),
        limit,
        lambda step: None,
    )
    assert all(list(keys) == ORDER[: len(keys)] for keys in asked)
    assert found.perplexity <= limit


def test_a_limit_that_wide_experts_do_not_meet_ends_the_search():
    found, steps = search({}, 0.99)
    assert found is None and len(steps) == 1


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("widths") / "plain"
    write_random_model(folder, wide_config().model_copy(update={"max_positions": 64}))
    return folder


@pytest.fixture(scope="module")
def calibration(source):
    """Text that the model itself has written, in windows as they are read: rounding harms it."""
    model, g = load(source), torch.Generator().manual_seed(3)
    ids = torch.randint(32, 122, (6, 1), generator=g)
    for _ in range(63):
        chances = model(ids)[:, -1, 32:122].float().softmax(dim=-1)
        ids = torch.cat((ids, 32 + torch.multinomial(chances, 1, generator=g)), dim=1)
    path = source.parent / "calibration.txt"
    path.write_text(bytes(ids.flatten().tolist()).decode())
    return path


def test_importance_is_that_of_each_expert_alone(source, calibration):
    """Expected from its definition, with one whole forward for each expert."""
    model = load(source)
    text = calibration.read_text()[:129]
    ids_T = torch.tensor(model.tokenizer(text, add_special_tokens=False)["input_ids"])
    widths = round_experts(model.decoder)
    found = measure_importance(model.decoder, widths, ids_T, 64)
    assert set(found) == set(KEYS) and all(value >= 0 for value in found.values())
    layer = dict(model.decoder.moe_layers())[2]
    inputs, grads = [], []
    with torch.enable_grad():
        embed = model.decoder.embed_tokens.register_forward_hook(
            lambda module, arguments, output: output.requires_grad_()
        )
        layer.experts.register_forward_hook(lambda m, a, out: inputs.append((a, out)))
        for start in (0, 64):
            from moeyard.moe.batch import batch_of_rows

            hidden = model.decoder(batch_of_rows(ids_T[start : start + 64].unsqueeze(0))).hidden_TD
            targets = ids_T[start + 1 : start + 65]
            loss = torch.nn.functional.cross_entropy(
                model.decoder.logits(hidden), targets, reduction="sum"
            )
            grads.append(torch.autograd.grad(loss, inputs[-1][1])[0])
        embed.remove()
    expected = torch.zeros(6, dtype=torch.float64)
    for (arguments, _), grad_ND in zip(inputs, grads, strict=True):
        x_ND, experts_NK, weights_NK = arguments[:3]
        for row in range(64):
            for expert, weight in zip(experts_NK[row].tolist(), weights_NK[row], strict=True):
                outputs = []
                for kind in widths[2]:
                    fc1, fc2 = kind.matrices(expert, torch.float64)
                    gate, up = (fc1 @ x_ND[row].double()).chunk(2)
                    outputs.append(fc2 @ (torch.nn.functional.silu(gate) * up))
                change = weight.double() * (outputs[1] - outputs[0])
                expected[expert] += (grad_ND[row].double() @ change) ** 2
    got = torch.tensor([found[2, expert] for expert in range(6)], dtype=torch.float64)
    assert torch.allclose(got, expected, rtol=2e-3)


def test_experts_that_change_in_memory_are_those_of_the_folder(source, tmp_path):
    model = load(source)
    experts = NarrowSome(model.decoder, round_experts(model.decoder))
    ids = torch.arange(120).reshape(2, 60)
    for narrow in ([], KEYS[::2], KEYS):
        bits_of = {key: 4 if key in narrow else 8 for key in KEYS}
        target = tmp_path / str(len(narrow))
        convert(source, target, bits_of=bits_of)
        experts.narrow(narrow)
        assert torch.equal(model(ids), load(target)(ids))


def test_the_folder_meets_the_tolerance_and_says_its_price(source, calibration, tmp_path, capsys):
    text = calibration.read_text()
    exact = score_text(load(source), text).perplexity
    convert(source, tmp_path / "int4", "int4")
    uniform = score_text(load(tmp_path / "int4"), text).perplexity
    tolerance = (uniform / exact - 1) / 2
    assert tolerance > 0, "the text does not tell int4 from the exact model"
    arguments = ["--dtype", "mixed", "--calibration", str(calibration)]
    arguments += ["--tolerance", str(tolerance)]
    main(["convert", str(source), str(tmp_path / "mixed"), *arguments])
    shown = capsys.readouterr()
    found = score_text(load(tmp_path / "mixed"), text).perplexity
    assert found <= exact * (1 + tolerance)
    kinds = list(ModelFolder(tmp_path / "mixed").formats.kind_of.values())
    assert 0 < sum(kinds) < len(kinds) == 12
    assert f"widths: {12 - sum(kinds)} int8, {sum(kinds)} int4" in shown.out
    assert f"{found:.5g} instead of {exact:.5g}" in shown.out
    assert "event=searching_widths int4=0 of=12" in shown.err
    price = read_prices(tmp_path / "mixed")["mixed"]
    assert price.lossy.perplexity == pytest.approx(found) and price.text == calibration.name


@pytest.mark.slow
def test_a_large_tolerance_gives_the_folder_of_one_width(source, calibration, tmp_path):
    found = convert_mixed(source, tmp_path / "mixed", calibration, tolerance=100)
    convert(source, tmp_path / "int4", "int4")
    assert (found.num_wide, found.num_narrow) == (0, 12)
    names = {path.name for path in (tmp_path / "int4").iterdir()}
    assert {path.name for path in (tmp_path / "mixed").iterdir()} == names | {"prices.json"}
    for name in names:
        assert (tmp_path / "mixed" / name).read_bytes() == (tmp_path / "int4" / name).read_bytes()


def test_bad_input_gets_one_sentence_and_nothing_is_written(source, calibration, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("x" * FEWEST_TOKENS)
    convert(source, tmp_path / "int8", "int8")
    plain = json.loads((source / "config.json").read_text())
    cases = [
        (source, short, 0.01, DataError, f"has {FEWEST_TOKENS} tokens; give a text of more than"),
        (source, tmp_path / "none", 0.01, DataError, "which cannot be read"),
        (source, calibration, -0.1, ConfigError, "tolerance is -0.1; use 0 or more"),
        (source, calibration, float("nan"), ConfigError, "tolerance is nan"),
        (tmp_path / "int8", calibration, 0.01, ModelFileError, "experts in few bits already"),
    ]
    for folder, text, tolerance, kind, message in cases:
        with pytest.raises(kind, match=message) as caught:
            convert_mixed(folder, tmp_path / "out", text, tolerance)
        assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
    assert plain and not any("out" in path.name for path in tmp_path.iterdir())


def test_a_tolerance_that_nothing_meets_is_refused(source, calibration, tmp_path, monkeypatch):
    scores = iter([10.0, 11.0])
    monkeypatch.setattr(
        "moeyard.serving.widths.tolerance.score_text",
        lambda *_: type("Score", (), {"perplexity": next(scores)}),
    )
    with pytest.raises(ConfigError, match=r"in int8 perplexity is 10.000% higher already; use a"):
        convert_mixed(source, tmp_path / "out", calibration, 0.05)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "mixed"], "--dtype mixed needs a text; give --calibration FILE."),
        (["--dtype", "int4", "--tolerance", "0.1"], "--tolerance is for --dtype mixed"),
        (["--calibration", "a.txt"], "--calibration is for --dtype mixed"),
    ],
)
def test_options_that_do_not_belong_together(source, tmp_path, capsys, arguments, message):
    assert main(["convert", str(source), str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err
