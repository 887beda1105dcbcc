"""Update rules against their formulas in plain loops, in fp64; which parameter follows which rule.

Equality over ranks is in tests/parallel (test_equivalence.py, test_paths.py), checkpoints that move
between meshes in test_fsdp_runs.py.
"""

import math

import pytest
import torch
from torch import nn

from moeyard.errors import CheckpointError, ConfigError
from moeyard.moe.experts.resident import Experts
from moeyard.parallel.dense.expert_shards import split_evenly
from moeyard.parallel.mesh import Mesh
from moeyard.training.optimizers.adamw import AdamWConfig
from moeyard.training.optimizers.frugal import Frugal, FrugalConfig
from moeyard.training.optimizers.held import hidden_matrices, hold_trained
from moeyard.training.optimizers.muon import MuonConfig
from moeyard.training.optimizers.newton_schulz import orthogonalize
from moeyard.training.optimizers.table import open_optimizer
from moeyard.training.read_config import read_run_config
from moeyard.training.trainer import Trainer

D, F, E = 6, 4, 3
LR, DECAY = 0.01, 0.1
OPTIONS = {"lr": LR, "weight_decay": DECAY, "betas": (0.8, 0.9), "eps": 1e-6}


class Small(nn.Module):
    """Each sort of parameter: an expert's, a projection's, a norm's, an embedding's, the head's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(5, D)
        self.experts = Experts(D, F, E, backend="reference", bias=True)
        self.proj = nn.Linear(D, 2 * D)
        self.lm_head = nn.Linear(D, 5, bias=False)


def small(config, steps=1, starved=(), model=None):
    """Train with random gradients; return the model, the gradients of each step and the masters.

    Experts in ``starved`` have no gradient after the first step.
    """
    torch.manual_seed(1)
    model = Small().double() if model is None else model
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = open_optimizer(config, model, {}, Mesh(), seed=7)
    gradients = []
    for step in range(steps):
        for name, parameter in model.named_parameters():
            parameter.main_grad = torch.randn_like(parameter)
            if name.startswith("experts") and step:
                parameter.main_grad[list(starved)] = 0
        gradients.append({n: p.main_grad.clone() for n, p in model.named_parameters()})
        optimizer.step(LR)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.main_grad, gradients[-1][name]), "gradients must stay"
    after = {name: p.detach().clone() for name, p in model.named_parameters()}
    return before, gradients, after, optimizer


def adamw_by_hand(weight, gradients, decay):
    """Return the weight after AdamW, number by number."""
    (b1, b2), eps = OPTIONS["betas"], OPTIONS["eps"]
    found = weight.clone().flatten()
    for index in range(found.numel()):
        w, m, v = float(found[index]), 0.0, 0.0
        for step, gradient in enumerate(gradients, 1):
            g = float(gradient.flatten()[index])
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
            w -= LR * decay * w
            w -= LR * (m / (1 - b1**step)) / (math.sqrt(v / (1 - b2**step)) + eps)
        found[index] = w
    return found.view_as(weight)


def orthogonal_by_hand(x, steps):
    """Return Newton-Schulz's result for one matrix, written from the formula."""
    a, b, c = 3.4445, -4.7750, 2.0315
    is_tall = x.shape[0] > x.shape[1]
    y = x.T.clone() if is_tall else x.clone()
    y /= y.square().sum().sqrt()
    for _ in range(steps):
        gram = torch.mm(y, y.T)
        y = a * y + torch.mm(b * gram + c * torch.mm(gram, gram), y)
    return y.T if is_tall else y


def muon_by_hand(weight, gradients, nesterov=True, momentum=0.95):
    """Return one matrix after Muon."""
    w, m = weight.clone(), torch.zeros_like(weight)
    for g in gradients:
        m = momentum * m + (1 - momentum) * g
        u = momentum * m + (1 - momentum) * g if nesterov else m
        w = w * (1 - LR * DECAY)
        if g.any():
            w = w - LR * 0.2 * math.sqrt(max(w.shape)) * orthogonal_by_hand(u, 5)
    return w


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)


def test_adamw_is_the_formula():
    before, gradients, after, _ = small(AdamWConfig(**OPTIONS), steps=3)
    for name, weight in before.items():
        decays = weight.ndim > 1 and not name.endswith("bias") and "embed" not in name
        close(
            after[name],
            adamw_by_hand(weight, [g[name] for g in gradients], DECAY if decays else 0),
        )


def test_hidden_matrices_are_those_of_projections_and_experts(config_file, tmp_path):
    assert set(hidden_matrices(Small())) == {"experts.fc1", "experts.fc2", "proj.weight"}
    options = ["model.moe.d_shared=8", "model.dense_layers=[0]", "model.d_ff=40"]
    config = read_run_config(config_file, [f"run_dir={tmp_path}/run", *options])
    decoder = Trainer(config, tmp_path / "run", Mesh()).decoder
    rest = {name for name, _ in decoder.named_parameters()} - set(hidden_matrices(decoder))
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in rest} == {
        *("embed_tokens", "lm_head", "norm", "gate"),
        *("input_layernorm", "post_attention_layernorm", "q_norm", "k_norm"),
    }
    assert {name.rpartition(".")[2] for name in set(hidden_matrices(decoder))} == {
        *("weight", "fc1", "fc2")
    }


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_orthogonalizes_each_expert_and_each_half_by_itself(nesterov):
    config = MuonConfig(**OPTIONS, nesterov=nesterov)
    before, gradients, after, _ = small(config, steps=3, starved=[1])
    for name, weight in before.items():
        per_step = [g[name] for g in gradients]
        if name == "proj.weight":
            close(after[name], muon_by_hand(weight, per_step, nesterov))
        elif name in ("experts.fc1", "experts.fc2"):
            halves = 2 if name.endswith("fc1") else 1
            for expert in range(E):
                matrices = [g[expert].chunk(halves) for g in per_step]
                for half, matrix in enumerate(weight[expert].chunk(halves)):
                    found = after[name][expert].chunk(halves)[half]
                    close(found, muon_by_hand(matrix, [m[half] for m in matrices], nesterov))
        else:
            decays = weight.ndim > 1 and not name.endswith("bias") and "embed" not in name
            close(after[name], adamw_by_hand(weight, per_step, DECAY if decays else 0))


def test_an_expert_without_rows_only_decays_under_muon():
    _, _, first, _ = small(MuonConfig(**OPTIONS), steps=1, starved=[1])
    _, _, last, _ = small(MuonConfig(**OPTIONS), steps=4, starved=[1])
    for name in ("experts.fc1", "experts.fc2"):
        close(last[name][1], first[name][1] * (1 - LR * DECAY) ** 3)
        assert not torch.allclose(last[name][0], first[name][0] * (1 - LR * DECAY) ** 3)


@pytest.mark.parametrize("shape", [(8, 32), (32, 8)])
def test_orthogonal_matrices_have_singular_values_near_one_whatever_their_scale(shape):
    torch.manual_seed(0)
    x = torch.randn(5, *shape, dtype=torch.float64)
    y = orthogonalize(x, 5)
    values = torch.linalg.svdvals(y)
    assert float(values.min()) > 0.65 and float(values.max()) < 1.25
    close(orthogonalize(1000 * x, 5), y)
    close(orthogonalize(x.mT, 5), y.mT)
    for one, expected in zip(x, y, strict=True):
        close(orthogonalize(one, 5), expected)
    rms = y.square().mean((1, 2)).sqrt() * 0.2 * math.sqrt(max(shape))
    assert bool(((rms - 0.2).abs() < 0.04).all())
    assert torch.equal(orthogonalize(torch.zeros(2, 3), 5), torch.zeros(2, 3))


def test_muon_updates_experts_in_parts_as_all_at_once(monkeypatch):
    _, _, whole, _ = small(MuonConfig(**OPTIONS), steps=2)
    monkeypatch.setattr("moeyard.training.optimizers.muon.MOST_NUMBERS", 1)
    _, _, parts, _ = small(MuonConfig(**OPTIONS), steps=2)
    for name, weight in whole.items():
        close(parts[name], weight)


def held_of(model, name):
    return next(held for held in hold_trained(model, {}, None) if held.name == name)


def frugal_by_hand(weight, gradients, chosen, every):
    """Return a matrix after FRUGAL; ``chosen`` has the columns with moments of each refresh."""
    found = weight.clone()
    for column in range(weight.shape[1]):
        w = found[:, column]
        for first in range(0, len(gradients), every):
            period = [g[:, column] for g in gradients[first : first + every]]
            if column in chosen[first // every]:
                w = adamw_by_hand(w, period, DECAY)
                continue
            for g in period:
                w = w * (1 - LR * DECAY) - LR * 0.5 * g.sign()
        found[:, column] = w
    return found


def test_frugal_is_adam_with_fresh_moments_for_chosen_columns_and_signs_for_the_others():
    config = FrugalConfig(**OPTIONS, density=0.34, refresh_steps=2, sign_lr_ratio=0.5)
    before, gradients, after, _ = small(config, steps=5, starved=[1])
    model, rule = Small(), Frugal(config, seed=7)
    for name in ("proj.weight", "experts.fc1", "experts.fc2"):
        held = held_of(model, name)
        chosen = [set(rule.chosen(held, refresh).tolist()) for refresh in range(3)]
        assert [len(columns) for columns in chosen] == [2, 2, 2]
        assert set.union(*chosen) == set(range(D)), "every column has its turn"
        per_step = [g[name] for g in gradients]
        if name == "proj.weight":
            close(after[name], frugal_by_hand(before[name], per_step, chosen, 2))
            continue
        for expert in range(E):  # columns are numbers of the model's width
            turned = name == "experts.fc2"
            one = [g[expert].T if turned else g[expert] for g in per_step]
            weight = before[name][expert]
            found = frugal_by_hand(weight.T if turned else weight, one, chosen, 2)
            close(after[name][expert], found.T if turned else found)
    rest = {name for name in before if name not in hidden_matrices(model)}
    for name in rest:
        decays = before[name].ndim > 1 and not name.endswith("bias") and "embed" not in name
        per_step = [g[name] for g in gradients]
        close(after[name], adamw_by_hand(before[name], per_step, DECAY if decays else 0))


def test_frugal_with_all_columns_is_adamw_to_the_bit():
    _, _, expected, _ = small(AdamWConfig(**OPTIONS), steps=5)
    _, _, actual, _ = small(FrugalConfig(**OPTIONS, density=1, refresh_steps=2), steps=5)
    for name, weight in expected.items():
        assert torch.equal(actual[name], weight), name


@pytest.mark.parametrize(
    ("config", "per_weight"),
    [(AdamWConfig(), 2), (MuonConfig(), 1), (FrugalConfig(density=0.5), 1)],
    ids=["adamw", "muon", "frugal"],
)
def test_each_kind_keeps_so_many_numbers_for_a_hidden_weight(config, per_weight):
    model = Small()
    optimizer = open_optimizer(config, model, {}, Mesh(), seed=0)
    for name in hidden_matrices(model):
        master, *state = optimizer.state_of(model.get_parameter(name))
        assert sum(tensor.numel() for tensor in state) == per_weight * master.numel()
    _, *state = optimizer.state_of(model.lm_head.weight)
    assert sum(tensor.numel() for tensor in state) == 2 * model.lm_head.weight.numel()


def test_columns_depend_on_seed_and_name_alone():
    model = Small()
    held = held_of(model, "experts.fc1")
    config = FrugalConfig(density=0.5)
    same = [Frugal(config, seed=7).chosen(held, n).tolist() for n in (0, 1, 0)]
    assert same[0] == same[2] and sorted(same[0] + same[1]) == list(range(D))
    other = [Frugal(config, seed).chosen(held, 0).tolist() for seed in range(20)]
    assert len({tuple(columns) for columns in other}) > 1


def tensors_of(run):
    return {key: tensor.clone() for key, tensor in run._step.optimizer.named_tensors()}


@pytest.mark.parametrize(
    "options",
    [["kind=muon"], ["kind=frugal", "density=0.3", "refresh_steps=2"]],
    ids=["muon", "frugal"],
)
def test_a_resumed_run_ends_with_the_bits_of_the_unbroken_one(config_file, tmp_path, options):
    """It stops after three steps, in the middle of the columns' second turn."""

    def run_to(name, steps, *more):
        overrides = [f"run_dir={tmp_path}/{name}", "train.precision=bf16", f"train.steps={steps}"]
        overrides += ["optimizer.warmup_steps=9", *(f"optimizer.{option}" for option in options)]
        config = read_run_config(config_file, [*overrides, *more])
        trainer = Trainer(config, tmp_path / name, Mesh())
        trainer.run()
        return trainer

    expected = tensors_of(run_to("whole", 5))
    run_to("parts", 3)
    actual = tensors_of(run_to("parts", 5))
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(actual[key], tensor), key
    with pytest.raises(CheckpointError, match=r"made with optimizer = .* but this run has .*adamw"):
        run_to("parts", 6, "optimizer={kind: adamw}")


def test_a_section_without_a_kind_is_adamw(config_file):
    config = read_run_config(config_file, ["optimizer={lr: 0.5, weight_decay: 0.2}"])
    assert config.optimizer == AdamWConfig(lr=0.5, weight_decay=0.2)
    again = read_run_config(config_file, ["optimizer.kind=muon", "optimizer.momentum=0.9"])
    assert again.optimizer == MuonConfig(lr=0.003, warmup_steps=2, momentum=0.9)


REFUSED = {
    "unknown": ("optimizer.kind=lion", "optimizer.kind is 'lion'; use one of 'adamw', 'muon'"),
    "of_another": ("optimizer.momentum=0.9", "optimizer.momentum is not a known key"),
    "slices": (
        "optimizer.kind=muon parallel.expert_tp=2",
        "optimizer.kind is muon, which needs whole matrices, but parallel.expert_tp is 2",
    ),
    "router": (
        "optimizer.kind=frugal train.parameters=router",
        "optimizer.kind is frugal, but train.parameters is router",
    ),
    "lora": (
        "optimizer.kind=muon train.parameters=lora",
        "optimizer.kind is muon, but train.parameters is lora",
    ),
    "no_experts": (
        "optimizer.shard_experts=true model.moe=null model.d_ff=8",
        "optimizer.shard_experts is true, but no experts train",
    ),
    "copies": (
        "optimizer.shard_experts=true parallel.ep=2 parallel.copies={}",
        "optimizer.shard_experts is true, but parallel.copies moves experts",
    ),
    "density": ("optimizer.kind=frugal optimizer.density=0", "optimizer.density: it is 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_one_sentence(config_file, case):
    overrides, message = REFUSED[case]
    with pytest.raises(ConfigError) as raised:
        read_run_config(config_file, overrides.split())
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_the_slots_of_all_layers_are_cut_into_equal_stretches():
    assert split_evenly([4, 4, 4], 2) == [
        [slice(0, 4), slice(4, 4)],
        [slice(0, 2), slice(2, 4)],
        [slice(0, 0), slice(0, 4)],
    ]
    for lengths, size in (([1, 1, 1, 1, 1], 3), ([2, 0, 5], 4), ([1], 2)):
        cut = split_evenly(lengths, size)
        for slots, length in zip(cut, lengths, strict=True):
            assert [slot for part in slots for slot in range(length)[part]] == list(range(length))
        owned = [sum(part.stop - part.start for part in ranks) for ranks in zip(*cut, strict=True)]
        assert max(owned) - min(owned) <= 1
