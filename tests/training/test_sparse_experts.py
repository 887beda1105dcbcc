"""N:M experts by SR-STE: masks and gradients against loops, what runs, checkpoints and exports see.

Equality over ranks is in tests/parallel/test_equivalence.py.
"""

import copy
import json

import pytest
import torch

import moeyard
from moeyard.errors import CheckpointError, ConfigError
from moeyard.kernels.values.n_of_m import NOfM, keep_mask, masked
from moeyard.moe.experts.resident import Experts
from moeyard.parallel.mesh import Mesh
from moeyard.training.checkpoints.export import export
from moeyard.training.optimizers.adamw import AdamWConfig
from moeyard.training.optimizers.sparse_experts import SparseExpertsConfig
from moeyard.training.optimizers.table import open_optimizer
from moeyard.training.read_config import read_run_config
from moeyard.training.trainer import Trainer

SPARSE = "train.sparse_experts={n: 2, m: 4, decay: 0.01}"


def mask_by_hand(row, n, m):
    """Return which numbers of a row stay, group by group."""
    stay = []
    for first in range(0, len(row), m):
        group = [abs(float(w)) for w in row[first : first + m]]
        best = sorted(range(m), key=lambda i: (-group[i], i))[:n]
        stay += [i in best for i in range(m)]
    return stay


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 2), (1, 4), (3, 8), (5, 6)])
def test_the_largest_of_each_group_stay_and_of_equal_ones_the_first(n, m):
    weight = torch.randint(-3, 4, (3, 5, 4 * m), generator=torch.Generator().manual_seed(m))
    mask = keep_mask(weight.float(), NOfM(n, m))
    rows = zip(weight.flatten(0, 1), mask.flatten(0, 1), strict=True)
    assert all(stay.tolist() == mask_by_hand(row, n, m) for row, stay in rows)
    assert not torch.signbit(masked(-torch.ones(4), torch.zeros(4, dtype=torch.bool))).any()
    assert keep_mask(torch.zeros(0, 2, 4 * m), NOfM(n, m)).shape == (0, 2, 4 * m)


def test_a_step_updates_all_weights_and_what_is_not_in_forward_decays_once():
    torch.manual_seed(0)
    experts = Experts(8, 4, 3, backend="reference", bias=True).double()
    dense = {name: p.detach().clone() for name, p in experts.named_parameters()}
    config = AdamWConfig(lr=0.1, weight_decay=0.0, betas=(0.5, 0.5), eps=1e-9)
    sparse = SparseExpertsConfig(n=1, m=2, decay=0.3)
    model = torch.nn.ModuleDict({"experts": experts})
    plain = open_optimizer(config, copy.deepcopy(model), {}, Mesh(), 0)
    optimizer = open_optimizer(config, model, {}, Mesh(), 0, sparse_experts=sparse)
    for name in ("fc1", "fc2"):
        kept = keep_mask(dense[name], NOfM(1, 2))
        assert torch.equal(getattr(experts, name), dense[name] * kept)
    assert torch.equal(experts.fc1_bias, dense["fc1_bias"])
    given = {}
    for name, parameter in model.named_parameters():
        parameter.main_grad = torch.randn_like(parameter)
        weight = dense[name.removeprefix("experts.")]
        given[name] = parameter.main_grad.clone()
        if name in ("experts.fc1", "experts.fc2"):
            given[name].add_(weight * ~keep_mask(weight, NOfM(1, 2)), alpha=0.3)
    for name, parameter in plain._model.named_parameters():
        parameter.main_grad = given[name]
    optimizer.step(0.1)
    plain.step(0.1)
    ours, theirs = dict(optimizer.named_tensors()), dict(plain.named_tensors())
    assert set(ours) == set(theirs)
    for key, tensor in theirs.items():
        assert torch.equal(ours[key], tensor), key
    flips = 0
    for name in ("fc1", "fc2"):
        after = torch.stack([ours[f"weight/experts.{e}.{name}"] for e in range(3)])
        kept = keep_mask(after, NOfM(1, 2))
        assert torch.equal(getattr(experts, name), after * kept)
        flips += int((kept ^ keep_mask(dense[name], NOfM(1, 2))).sum())
    assert optimizer.masks.record(Mesh()) == {"mask_flips": flips} and flips > 0


def trained(config_file, run_dir, *options):
    config = read_run_config(config_file, [f"run_dir={run_dir}", *options])
    run_dir.mkdir(exist_ok=True)
    trainer = Trainer(config, run_dir, Mesh())
    trainer.run()
    return trainer


def records(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def experts_of(trainer):
    return [layer.experts for _, layer in trainer.decoder.moe_layers()]


def is_sparse(weight) -> bool:
    return bool(((weight.unflatten(-1, (-1, 4)) != 0).sum(dim=-1) <= 2).all())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_export_has_the_weights_that_evaluations_saw(config_file, tmp_path, precision):
    options = (SPARSE, f"train.precision={precision}", "train.steps=4")
    trainer = trained(config_file, tmp_path / "run", *options)
    export(tmp_path / "run", tmp_path / "out")
    again = read_run_config(
        config_file,
        [
            *(f"run_dir={tmp_path}/again", f"start_from={tmp_path}/out", "data.tokenizer=null"),
            *("train.steps=1", f"train.precision={precision}"),
        ],
    )
    (tmp_path / "again").mkdir()
    reader = Trainer(again, tmp_path / "again", Mesh())
    for ours, read in zip(experts_of(trainer), experts_of(reader), strict=True):
        assert torch.equal(ours.fc1, read.fc1) and torch.equal(ours.fc2, read.fc2)
        assert is_sparse(read.fc1) and is_sparse(read.fc2)
    losses = [t.objective.evaluate(t._loss, Mesh()).metrics["eval_loss"] for t in (trainer, reader)]
    assert losses[0] == losses[1] == records(tmp_path / "run")[-1]["eval_loss"]
    moeyard.load(tmp_path / "out")(torch.tensor([[1, 2, 3]]))


def test_a_run_that_goes_on_changes_no_bit(config_file, tmp_path):
    """It resumes before, at and after the first step with masks."""
    options = ("train.sparse_experts={start: 3, decay: 0.1}", "train.accumulation=2")
    options += ("checkpoint.every=1", "optimizer.warmup_steps=9")
    whole = trained(config_file, tmp_path / "whole", *options)
    for steps in (2, 3, 5, 6):
        parts = trained(config_file, tmp_path / "parts", *options, f"train.steps={steps}")
    for ours, theirs in zip(experts_of(whole), experts_of(parts), strict=True):
        assert torch.equal(ours.fc1, theirs.fc1) and is_sparse(ours.fc1)
    flips = [record["mask_flips"] for record in records(tmp_path / "whole")]
    assert flips == [record["mask_flips"] for record in records(tmp_path / "parts")]
    assert flips[:3] == [0, 0, 0] and all(flips[3:])


def test_before_the_first_masks_a_run_is_the_dense_one_bit_for_bit(config_file, tmp_path):
    late = "train.sparse_experts={start: 4, decay: 0.1}"
    sparse = trained(config_file, tmp_path / "sparse", late, "checkpoint.every=3", "train.steps=3")
    dense = trained(config_file, tmp_path / "dense", "checkpoint.every=3", "train.steps=3")
    for ours, theirs in zip(experts_of(sparse), experts_of(dense), strict=True):
        assert torch.equal(ours.fc1, theirs.fc1)
    export(tmp_path / "sparse", tmp_path / "a")
    export(tmp_path / "dense", tmp_path / "b")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]


def test_a_checkpoint_of_other_masks_is_refused(config_file, tmp_path):
    trained(config_file, tmp_path / "run", SPARSE, "train.steps=1")
    with pytest.raises(CheckpointError, match=r"sparse_experts = .*'m': 4.* but this run has None"):
        trained(config_file, tmp_path / "run", "train.steps=2")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["train.sparse_experts={n: 4}"], "n is 4 and m is 4; n must be smaller"),
        (["train.sparse_experts={n: 2, m: 6}"], "m is 6, which must divide model.d_model = 32"),
        (
            [SPARSE, "parallel.expert_tp=8"],
            "model.moe.d_expert = 16 .in each of 8 slices of parallel.expert_tp.; choose another m",
        ),
        ([SPARSE, "train.parameters=lora"], "train.parameters is lora, and experts do not train"),
        ([SPARSE, "model.moe=null", "model.d_ff=8"], "but the model has no experts; leave it out"),
    ],
)
def test_what_cannot_be_sparse_gets_one_sentence(config_file, tmp_path, options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        read_run_config(config_file, [f"run_dir={tmp_path}/run", *options])
