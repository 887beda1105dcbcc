"""``moeyard sparsify``: neurons cut into experts, routers that predict norms, a threshold chosen.

T tokens, D model width, F width of the MLP, E experts, f = F / E.
"""

import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import moeyard
from moeyard.cli import main
from moeyard.errors import Stopped
from moeyard.moe.batch import batch_of_rows
from moeyard.moe.folders.cut import cluster_neurons
from moeyard.moe.folders.folder import ModelFolder
from moeyard.moe.folders.text_codec import TextCodec
from moeyard.training.data.tokenizer import ByteTokenizer
from moeyard.training.sparsify.dense import mlps, open_dense, reorder
from moeyard.training.sparsify.fine_tune import active_share
from moeyard.training.sparsify.measure import Row, choose
from moeyard.training.sparsify.regress import OutputNorms
from moeyard.training.sparsify.settings import Settings
from moeyard.training.sparsify.sparsify import sparsify
from moeyard.training.sparsify.text import Text
from moeyard.training.stop import StopRequest

from hf_families import save

TEXT = "".join(f"{n} plus {n} is {2 * n}. " for n in range(200))
SMALL = {"experts": 7, "router_width": 16, "length": 24, "batch": 4, "eval_windows": 6}
QUICK = Settings(**SMALL, steps=3, router_steps=4, activation="reglu", tau=0.5)
IDS = torch.randint(0, 250, (3, 31), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    """Two dense folders whose MLPs have 56 neurons."""
    folder = tmp_path_factory.mktemp("dense")
    for case in ("llama", "qwen3"):
        options = {"vocab_size": 257, "eos_token_id": 256, "pad_token_id": 256}
        save(case, folder / case, **options)
        ByteTokenizer().save(folder / case)
    return folder


def tokenizer(dense: Path):
    return TextCodec(dense / "llama").tokenizer


def run(source: Path, target: Path, settings: Settings, stop: StopRequest | None = None):
    return sparsify(source, target, Path("text.txt"), TEXT, settings, stop)


def neurons(tensors: dict[str, torch.Tensor], layer: int) -> torch.Tensor:
    """Return gate row, up row and down column of each neuron of a layer, ``[F, 3D]``."""
    parts = []
    for name in ("gate", "up", "down"):
        mlp = f"model.layers.{layer}.mlp"
        if f"{mlp}.{name}_proj.weight" in tensors:
            found = [tensors[f"{mlp}.{name}_proj.weight"]]
        else:
            found = [tensors[f"{mlp}.experts.{e}.{name}_proj.weight"] for e in range(7)]
        parts.append(torch.cat([w.T if name == "down" else w for w in found]))
    return torch.cat(parts, dim=1)


def test_neurons_of_one_direction_share_an_expert():
    generator = torch.Generator().manual_seed(0)
    centers_ED = torch.randn(5, 12, generator=generator)
    expert_F = torch.arange(40) % 5
    lengths_F1 = torch.rand(40, 1, generator=generator) + 0.1
    noise_FD = 0.05 * torch.randn(40, 12, generator=generator)
    order_F = cluster_neurons(lengths_F1 * (centers_ED[expert_F] + noise_FD), 5)
    assert sorted(order_F.tolist()) == list(range(40))
    found = [set(expert_F[part].tolist()) for part in order_F.chunk(5)]
    assert [len(experts) for experts in found] == [1] * 5


def test_parts_are_equal_even_where_clusters_are_not():
    rows_FD = torch.eye(6).repeat_interleave(torch.tensor([9, 1, 1, 1, 1, 5]), dim=0)
    order_F = cluster_neurons(rows_FD, 6)
    assert sorted(order_F.tolist()) == list(range(18))
    kinds = [rows_FD[part].argmax(dim=1).tolist() for part in order_F.chunk(6)]
    assert sum(len(set(part)) == 1 for part in kinds) >= 4


@torch.no_grad()
def test_another_order_of_neurons_is_the_same_function(dense):
    folder = ModelFolder(dense / "qwen3")
    decoder = open_dense(folder).double()
    before = decoder(batch_of_rows(IDS)).hidden_TD
    old = {layer: mlp.up_proj.weight.clone() for layer, mlp in mlps(decoder).items()}
    orders = {layer: torch.randperm(56) for layer in mlps(decoder)}
    reorder(decoder, orders)
    after = decoder(batch_of_rows(IDS)).hidden_TD
    for layer, mlp in mlps(decoder).items():
        assert torch.equal(mlp.up_proj.weight, old[layer][orders[layer]])
    assert (after - before).abs().max() <= 1e-12 * before.abs().max()
    folder.close()


def test_the_share_of_active_neurons_is_hoyers_measure_over_the_width():
    gate_TF = torch.tensor([[3.0, -1, -2, -3], [2, 2, 2, 2], [1, 3, -5, -5], [-1, -1, -1, -1]])
    shares = [float(active_share(row.unsqueeze(0), "reglu")) for row in gate_TF]
    assert shares == pytest.approx([0.25, 1, 0.4, 0], abs=1e-6)
    assert float(active_share(gate_TF, "reglu")) == pytest.approx(1.65 / 4)
    assert float(active_share(gate_TF[:1] - 10, "swiglu")) == pytest.approx(0.25)
    gate_TF.requires_grad_()
    active_share(gate_TF, "reglu").backward()
    assert gate_TF.grad.isfinite().all() and gate_TF.grad[2, 0] > 0 > gate_TF.grad[2, 1]


def test_norms_are_those_of_each_experts_output():
    generator = torch.Generator().manual_seed(0)
    down_DF = torch.randn(9, 20, generator=generator, dtype=torch.float64)
    h_TF = torch.randn(11, 20, generator=generator, dtype=torch.float64)
    h_TF[3, :5] = 0
    found_TE = OutputNorms(down_DF, 4).of(h_TF)
    outputs = [h_TF[:, p] @ down_DF[:, p].T for p in torch.arange(20).chunk(4)]
    wanted_TE = torch.stack([y_TD.norm(dim=1) for y_TD in outputs], dim=1)
    torch.testing.assert_close(found_TE, wanted_TE, rtol=1e-12, atol=1e-12)


def test_held_out_text_is_the_last_tenth_and_no_target_is_there_twice(dense):
    settings = Settings(**SMALL)
    text = Text(Path("text.txt"), TEXT, tokenizer(dense), settings)
    windows = torch.cat(text.held_out())
    ids = torch.tensor(list(TEXT.encode()))
    starts = [_find(ids, window) for window in windows]
    assert len(windows) == 6 and min(starts) >= 0.9 * len(ids) - 1
    assert all(b - a >= 24 for a, b in itertools.pairwise(starts))
    trained = torch.cat([text.windows("routers", step) for step in range(40)])
    assert max(_find(ids, window) for window in trained) + 25 <= 0.9 * len(ids) + 1
    again = Text(Path("text.txt"), TEXT, tokenizer(dense), settings)
    assert torch.equal(again.windows("routers", 3), text.windows("routers", 3))
    assert not torch.equal(again.windows("routers", 3), text.windows("fine-tuning", 3))


def _find(ids: torch.Tensor, window: torch.Tensor) -> int:
    found = (ids.unfold(0, len(window), 1) == window).all(dim=1).nonzero()
    assert len(found) == 1
    return int(found)


@pytest.mark.parametrize("case", ["llama", "qwen3"])
def test_with_all_experts_on_the_folder_is_the_dense_model(dense, tmp_path, case):
    settings = Settings(**SMALL, router_steps=2, tau=0.0)
    found = run(dense / case, tmp_path / "m", settings)
    before = load_file(dense / case / "model.safetensors")
    after = load_file(tmp_path / "m/model.safetensors")
    for layer in range(3):
        old, new = neurons(before, layer), neurons(after, layer)
        assert sorted(old.tolist()) == sorted(new.tolist()) and not torch.equal(old, new)
    wanted = moeyard.load(dense / case)(IDS)
    logits = moeyard.load(tmp_path / "m")(IDS)
    assert wanted.abs().max() > 1
    assert (logits - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert found.row.loss == pytest.approx(found.dense_loss, rel=1e-6)
    assert found.row.experts == 7 and found.row.mlp_flops > 1


def test_the_command_writes_a_model_with_the_measured_loss(dense, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    given = {**SMALL, "router-steps": 40, "router-lr": 0.01, "steps": 3, "activation": "reglu"}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    source, target, data = dense / "qwen3", tmp_path / "m", f"--data={tmp_path / 'text.txt'}"
    assert main(["sparsify", str(source), str(target), data, *options, "--tolerance=0.01"]) == 0
    assert "sparsified folder=" in capsys.readouterr().out and not (tmp_path / "m.work").exists()
    table = json.loads((target / "sparsify.json").read_text())
    rows, row = table["rows"], table["row"]
    experts = [r["experts"] for r in rows]
    assert experts[0] == 7 and experts[-1] == 1 and experts == sorted(experts, reverse=True)
    assert row["loss"] <= 1.01 * rows[0]["loss"] and 1 < row["experts"] < 7
    assert table["router_error"] < 0.4

    model = moeyard.load(target)
    assert model.config.moe.activation == "reglu" and model.config.moe.router.tau == row["tau"]
    text = Text(Path("text.txt"), TEXT, tokenizer(dense), Settings(**SMALL))
    windows = torch.cat(text.held_out())
    logits_BTV = model(windows[:, :-1])
    loss = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), windows[:, 1:].flatten())
    assert float(loss) == pytest.approx(row["loss"], rel=1e-5)
    offloaded = moeyard.load(target, expert_memory="30%")
    assert torch.equal(offloaded(windows[:, :-1]), logits_BTV)
    answers = [m.generate(IDS[:1], max_new_tokens=5, temperature=0) for m in (model, offloaded)]
    assert torch.equal(*answers)


def test_an_interrupted_command_goes_on_to_the_same_bytes(dense, tmp_path):
    run(dense / "llama", tmp_path / "whole", QUICK)
    stops = 0
    other = QUICK.model_copy(update={"lr": 0.1})
    while not (tmp_path / "m").exists():
        stop = StopRequest()
        stop.signal_name = "SIGTERM"
        try:
            run(dense / "llama", tmp_path / "m", QUICK, stop)
        except Stopped:
            stops += 1
            with pytest.raises(moeyard.MoeyardError, match=r"lr = 0.0003, and now it is 0.1"):
                run(dense / "llama", tmp_path / "m", other)
    assert stops == 8  # after each step but the last of both trainings, and after each layer's cut
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "m" / path.name).read_bytes() == path.read_bytes(), path.name


def test_the_cheapest_threshold_within_the_tolerance_is_chosen():
    rows = [Row(t, loss, 4, (4,), f, f) for t, loss, f in
            ((0.0, 2.0, 1.1), (0.2, 1.99, 0.9), (0.5, 2.019, 0.5), (0.6, 2.03, 0.4))]  # fmt: skip
    assert choose(rows, Settings()).tau == 0.5
    assert choose(rows, Settings(tolerance=0.0)).tau == 0.2
    assert choose(rows, Settings(tau=0.6)).tau == 0.6
    worse = [rows[0], *(Row(r.tau, 3.0, 4, (4,), r.flops, r.flops) for r in rows[1:])]
    assert choose(worse, Settings()).tau == 0.0
    assert 0.33 in Settings(tau=0.33).grid and Settings(tau=0.33, rule="share").grid[0] == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--experts=5"], "experts is 5, which does not cut the MLP's 56 neurons .* divisor of 56"),
        (["--experts=1"], "experts: it is 1, but should be greater than or equal to 2"),
        (["--experts=112"], "experts is 112, which does not cut"),
        (["--experts=7", "--activation=reglu"], "activation is reglu, but steps is 0"),
        (["--experts=7", "--length=500"], "length is 500, but the model takes at most 256 tokens"),
        (["--experts=7", "--tau=1.5"], "tau: it is 1.5, but should be less than or equal to 1"),
        (["--experts=7"], r"has \d+ tokens, but a tenth .* must fill a window of 257; give 2571"),
        (["--experts=7", "--data=none.txt"], "--data is 'none.txt', which cannot be read"),
    ],
)
def test_what_cannot_work_gets_one_sentence(dense, tmp_path, capsys, options, message):
    (tmp_path / "text.txt").write_text(TEXT[:2000])
    given = ["sparsify", str(dense / "llama"), str(tmp_path / "m")]
    assert main([*given, f"--data={tmp_path / 'text.txt'}", *options]) == 2
    shown = capsys.readouterr().err
    assert re.search(message, shown) and shown.count("\n") == 1
    assert list(tmp_path.iterdir()) == [tmp_path / "text.txt"]


def test_a_model_with_experts_and_a_family_that_is_not_read_are_refused(dense, tmp_path):
    run(dense / "llama", tmp_path / "m", Settings(**SMALL, router_steps=1, tau=0.5))
    with pytest.raises(moeyard.MoeyardError, match="has 7 experts already; give a dense folder"):
        run(tmp_path / "m", tmp_path / "again", Settings(**SMALL))
    with pytest.raises(moeyard.MoeyardError, match="m exists already; remove it"):
        run(dense / "llama", tmp_path / "m", Settings(**SMALL))
    config = json.loads((dense / "llama/config.json").read_text())
    (tmp_path / "gpt").mkdir()
    (tmp_path / "gpt/config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    with pytest.raises(moeyard.MoeyardError, match="model_type 'gpt2'; the known ones are"):
        run(tmp_path / "gpt", tmp_path / "other", Settings(**SMALL))
