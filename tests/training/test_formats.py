"""What the first format wrote opens as it did; a newer format is one sentence.

``format_1`` has the small files of a run and of its export, as release 0.1.0 wrote them.
"""

import json
import shutil
from pathlib import Path

import pytest

from moeyard.errors import CheckpointError
from moeyard.moe.config.model import ModelConfig
from moeyard.moe.folders.hf_config import from_hf
from moeyard.training.checkpoints.files import read_state
from moeyard.training.optimizers.adamw import AdamWConfig
from moeyard.training.read_config import read_run_config

OLD = Path(__file__).parent / "format_1"


def test_the_configuration_of_a_run_means_what_it_meant():
    config = read_run_config(OLD / "config.yaml", [])
    assert config.train.steps == 2 and config.model.moe.num_experts == 2
    assert config.optimizer == AdamWConfig(schedule="cosine", decay_share=None)


def test_the_state_of_a_checkpoint_is_read():
    state = read_state(OLD)
    model = ModelConfig.model_validate(state["model"])
    assert state["step"] == 2 and state["precision"] == "fp32"
    assert model == read_run_config(OLD / "config.yaml", ["model.vocab_size=257"]).model


def test_the_export_is_read_as_the_model_it_was():
    values = json.loads((OLD / "config.json").read_text())
    found, state = from_hf(values), read_state(OLD)
    assert (found.d_model, found.num_layers, found.vocab_size) == (8, 1, 257)
    assert found.moe.router.k == state["model"]["moe"]["router"]["k"] == 1


def test_a_newer_format_is_refused_with_both_numbers(tmp_path):
    shutil.copy(OLD / "state.json", tmp_path)
    newer = json.loads((tmp_path / "state.json").read_text()) | {"version": 2}
    (tmp_path / "state.json").write_text(json.dumps(newer))
    with pytest.raises(CheckpointError, match="has format 2, but this release reads 1; use the"):
        read_state(tmp_path)
