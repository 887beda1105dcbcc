"""What a run on another device than the host's needs; without a GPU."""

import torch

from moeyard.moe.experts.resident import Experts
from moeyard.parallel.mesh import Mesh
from moeyard.training import setup
from moeyard.training.read_config import read_run_config
from moeyard.training.saves import GENERATOR_BYTES
from moeyard.training.setup import build_model, fill_vocabulary
from moeyard.training.trainer import Trainer


class GpuGenerator:
    """Stands for a GPU's random generator."""

    def get_state(self):
        return torch.arange(16, dtype=torch.uint8)


def trainer(config_file, tmp_path, *overrides) -> Trainer:
    config = read_run_config(config_file, [f"run_dir={tmp_path}/run", *overrides])
    return Trainer(config, tmp_path / "run", Mesh())


def test_a_run_of_a_gpu_goes_on_without_one(config_file, tmp_path):
    """Its random streams begin anew, as with another number of ranks."""
    on_gpu = trainer(config_file, tmp_path, "train.steps=3")
    on_gpu.saves._generator = GpuGenerator()
    on_gpu.run()
    on_cpu = trainer(config_file, tmp_path)
    assert on_cpu.saves.resume() == 3
    assert {16, len(torch.get_rng_state())} == set(GENERATOR_BYTES)
    weights = dict(on_gpu.decoder.named_parameters())
    for name, weight in on_cpu.decoder.named_parameters():
        assert torch.equal(weight, weights[name]), name


def test_experts_are_made_where_they_train(config_file, tmp_path, monkeypatch):
    """Experts of all ranks of a host need not fit into its memory. Meta stands for a GPU."""
    config = read_run_config(config_file, [f"run_dir={tmp_path}/run"])
    run = Trainer(config, tmp_path / "run", Mesh())
    model = fill_vocabulary(config, run._data.tokenizer)
    monkeypatch.setattr(setup, "device", lambda: torch.device("meta"))
    decoder = build_model(config, model, run._data, Mesh(ep_size=2, ep_rank=1))
    places = {name: parameter.device.type for name, parameter in decoder.named_parameters()}
    assert {places[name] for name in places if ".experts." in name} == {"meta"}
    assert {places[name] for name in places if ".experts." not in name} == {"cpu"}
    for _, layer in decoder.moe_layers():
        assert isinstance(layer.experts, Experts)
        assert layer.experts.expert_ids == (2, 3) and layer.experts.fc1.shape[0] == 2
