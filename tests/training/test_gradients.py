"""What a step computes, against plain autograd and arithmetic by hand."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F

import moeyard
from moeyard.errors import ConfigError
from moeyard.moe.batch import batch_of_rows
from moeyard.moe.layer import MoELayer
from moeyard.moe.models.initialize import initialize
from moeyard.moe.routers.hash_tables import balanced_table, clustered_table
from moeyard.parallel.mesh import Mesh
from moeyard.training.objectives.next_token import NextToken
from moeyard.training.read_config import read_run_config
from moeyard.training.trainer import Trainer

from small_model import write_decoder

PLAIN = ["train.precision=fp64", "model.moe.router={kind: topk, k: 2, balance_loss: 0, z_loss: 0}"]


def trainer(config_file, tmp_path, *overrides) -> Trainer:
    config = read_run_config(config_file, [f"run_dir={tmp_path}/run", *overrides])
    return Trainer(config, tmp_path / "run", Mesh())


def test_a_hash_table_is_balanced_by_the_tokens_of_the_training_data(config_file, tmp_path):
    run = trainer(config_file, tmp_path, "model.moe.router={kind: hash, k: 2}")
    table_VK = run.decoder.routers()[0].table_VK
    counts = run._data.train.token_counts()
    assert max(counts) > 1000
    counts = counts + [0] * (len(table_VK) - len(counts))
    assert torch.equal(table_VK, balanced_table(counts, 4, 2))
    assert not torch.equal(table_VK, balanced_table([1] * len(counts), 4, 2))


def test_a_hash_table_is_made_of_the_embeddings_of_a_model_folder(config_file, tmp_path):
    run = trainer(config_file, tmp_path)
    write_decoder(tmp_path / "model", run.decoder, eos_id=0)
    embeddings_VD = run.decoder.embed_tokens.weight
    router = f"model.moe.router={{kind: hash, table: clustered, embeddings: {tmp_path}/%s}}"
    clustered = trainer(config_file, tmp_path, router % "model").decoder
    expected_VK = clustered_table(embeddings_VD, 4, 1, seed=0)
    assert torch.equal(clustered.routers()[0].table_VK, expected_VK)
    # The table is in the weights: the folder with the embeddings is no longer needed.
    write_decoder(tmp_path / "export", clustered, eos_id=0)
    shutil.rmtree(tmp_path / "model")
    loaded = moeyard.load(tmp_path / "export").decoder
    assert torch.equal(loaded.routers()[0].table_VK, expected_VK)
    with pytest.raises(ConfigError, match=r"router\.embeddings is .*none', which cannot be used"):
        trainer(config_file, tmp_path, router % "none")


@pytest.fixture
def biased_experts(monkeypatch):
    """Experts of decoders get biases, which no configuration asks for."""

    class BiasedLayer(MoELayer):
        def __init__(self, *arguments, **options) -> None:
            super().__init__(*arguments, **(options | {"expert_bias": True}))

    monkeypatch.setattr("moeyard.moe.models.routed.MoELayer", BiasedLayer)


def fill_biases(decoder) -> None:
    torch.manual_seed(0)
    for _, layer in decoder.moe_layers():
        for bias in (layer.experts.fc1_bias, layer.experts.fc2_bias):
            torch.nn.init.normal_(bias)


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_biases_of_experts_have_main_gradients_too(tmp_path, config_file, biased_experts, backend):
    precision = ["train.precision=fp32"] if backend == "auto" else []
    run = trainer(config_file, tmp_path, *PLAIN, "train.accumulation=2", *precision)
    decoder = run.decoder
    fill_biases(decoder)
    biases = [p for name, p in decoder.named_parameters() if name.endswith("bias")]
    assert [tuple(bias.shape) for bias in biases] == 2 * [(4, 32), (4, 32)]
    for _, layer in decoder.moe_layers():
        layer.experts.backend = "reference"
    windows = run._data.train.sequences(0, range(8))
    logits = decoder.logits(decoder(batch_of_rows(windows[:, :-1])).hidden_TD)
    loss = F.cross_entropy(logits, windows[:, 1:].reshape(-1))
    expected = torch.autograd.grad(loss, biases)
    for _, layer in decoder.moe_layers():
        layer.experts.backend = backend
    found, scale = [], run._step.gradients.scale_
    run._step.gradients.scale_ = lambda factor: (
        found.extend(bias.main_grad.clone() for bias in biases),
        scale(factor),
    )
    run._step.run(0, stop_requested=False)
    tolerance = (
        {"rtol": 1e-10, "atol": 1e-14} if backend == "torch" else {"rtol": 1e-3, "atol": 1e-6}
    )
    for gradient, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, **tolerance)
    keys = {key for key, _ in run._step.optimizer.named_tensors()}
    assert {f"weight/layers.0.mlp.experts.{e}.fc1_bias" for e in range(4)} < keys
    assert "exp_avg_sq/layers.1.mlp.experts.3.fc2_bias" in keys


def test_biases_of_experts_begin_with_zeros_and_do_not_decay(tmp_path, config_file, biased_experts):
    run = trainer(config_file, tmp_path, *PLAIN)
    biases = [p for name, p in run.decoder.named_parameters() if name.endswith("bias")]
    assert len(biases) == 4 and not any(bias.any() for bias in biases)
    fill_biases(run.decoder)
    before = [bias.detach().clone() for bias in biases]
    run._step.gradients.zero()
    run._step.gradients.accumulate()
    run._step.optimizer.step(lr=0.5)
    assert all(map(torch.equal, biases, before))


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_main_gradients_are_those_of_the_mean_cross_entropy(tmp_path, config_file, accumulation):
    tied = ["model.tie_embeddings=true", f"train.accumulation={accumulation}"]
    run = trainer(config_file, tmp_path, *PLAIN, *tied)
    decoder = run.decoder
    windows = run._data.train.sequences(0, range(8))
    for _, layer in decoder.moe_layers():
        layer.experts.backend = "reference"  # plain autograd, which knows no main gradients
    logits = decoder.logits(decoder(batch_of_rows(windows[:, :-1])).hidden_TD)
    loss = F.cross_entropy(logits, windows[:, 1:].reshape(-1))
    parameters = list(decoder.parameters())
    expected = torch.autograd.grad(loss, parameters)
    for _, layer in decoder.moe_layers():
        layer.experts.backend = "torch"
    found = {}
    scale = run._step.gradients.scale_
    run._step.gradients.scale_ = lambda factor: (
        found.update({id(p): p.main_grad.clone() for p in parameters}),
        scale(factor),
    )
    result = run._step.run(0, stop_requested=False)
    assert result.loss == pytest.approx(float(loss.detach()), rel=1e-12)
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(found[id(parameter)], gradient, rtol=1e-10, atol=1e-14)
    by_hand = torch.stack([g.norm() for g in expected]).norm()
    assert result.grad_norm == pytest.approx(float(by_hand), rel=1e-12)


def test_steps_and_evaluation_separate_packed_documents(tmp_path, config_file):
    texts = "".join(json.dumps({"text": f"text {n} " * (1 + n % 5)}) + "\n" for n in range(200))
    (tmp_path / "d.jsonl").write_text(texts)
    options = [*PLAIN, f"data.source={tmp_path}/d.jsonl", "train.packing=documents"]
    options.append("train.eval_sequences=5")
    run = trainer(config_file, tmp_path, *options)
    held_out = run._data.held_out
    assert len(held_out) > 5  # five of them, spread evenly, are scored
    evaluated = held_out.in_order([place * len(held_out) // 5 for place in range(5)])
    packed, reaching = NextToken(run.decoder, run._data.train.eos_id), NextToken(run.decoder)
    for windows, found in (
        (evaluated, lambda: run.objective.evaluate(run._loss, Mesh()).metrics["eval_loss"]),
        (run._data.train.sequences(0, range(8)), lambda: run._step.run(0, False).loss),
    ):
        expected, other = (
            float(objective(windows).loss_sum.detach()) / (len(windows) * 32)
            for objective in (packed, reaching)
        )
        assert abs(expected - other) > 1e-9
        assert found() == pytest.approx(expected, rel=1e-12)


def test_clipping_scales_by_the_global_norm(tmp_path, config_file):
    run = trainer(config_file, tmp_path, *PLAIN, "optimizer.clip_norm=0.01")
    result = run._step.run(0, stop_requested=False)
    assert result.grad_norm > 0.1
    assert float(run._step.gradients.norm()) == pytest.approx(0.01, rel=1e-4)


def test_matrices_decay_and_norms_and_embeddings_do_not(tmp_path, config_file):
    run = trainer(config_file, tmp_path, *PLAIN)
    before = {name: p.detach().clone() for name, p in run.decoder.named_parameters()}
    run._step.gradients.zero()
    run._step.optimizer.step(lr=0.5)
    for name, parameter in run.decoder.named_parameters():
        decays = parameter.ndim > 1 and "embed" not in name
        factor = 1 - 0.5 * 0.1 if decays else 1.0
        torch.testing.assert_close(parameter.data, before[name] * factor, msg=name)


def test_bf16_starts_from_the_numbers_of_fp32_and_keeps_the_router_wide(tmp_path, config_file):
    run = trainer(config_file, tmp_path, "train.precision=bf16")
    wide = trainer(config_file, tmp_path, "train.precision=fp32")
    masters = dict(run._step.optimizer.named_tensors())
    for key, tensor in wide._step.optimizer.named_tensors():
        assert masters[key].dtype == torch.float32
        assert torch.equal(masters[key], tensor), key
    for name, parameter in run.decoder.named_parameters():
        is_router = name.endswith("mlp.gate.weight")
        assert parameter.dtype == (torch.float32 if is_router else torch.bfloat16), name
        assert parameter.main_grad.dtype == torch.float32
    run._step.run(0, stop_requested=False)
    masters = dict(run._step.optimizer.named_tensors())
    norm = run.decoder.norm.weight
    assert torch.equal(norm, masters["weight/norm.weight"].bfloat16())
    assert not torch.equal(norm.float(), masters["weight/norm.weight"])


def test_weights_at_the_start_depend_on_seed_and_name_alone(tmp_path, config_file):
    run = trainer(config_file, tmp_path)
    before = {name: p.detach().clone() for name, p in run.decoder.named_parameters()}
    torch.manual_seed(99)
    initialize(run.decoder, 3)
    assert all(torch.equal(p, before[n]) for n, p in run.decoder.named_parameters())
    initialize(run.decoder, 4)
    assert not torch.equal(run.decoder.lm_head.weight, before["lm_head.weight"])
    fc1 = before["layers.0.mlp.experts.fc1"]
    assert not torch.equal(fc1[0], fc1[1])
