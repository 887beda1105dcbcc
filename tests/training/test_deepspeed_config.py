"""What a run hands to DeepSpeed and what it refuses, without DeepSpeed."""

import importlib.util
import json
from pathlib import Path

import pytest

from moeyard.errors import ConfigError
from moeyard.training import deepspeed_settings as settings_module
from moeyard.training.__main__ import main
from moeyard.training.deepspeed_settings import check_deepspeed, deepspeed_settings
from moeyard.training.read_config import read_run_config

ON = "parallel.dense=deepspeed"


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    """Let DeepSpeed seem installed."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        settings_module.importlib.util,
        "find_spec",
        lambda name: object() if name == "deepspeed" else find_spec(name),
    )


@pytest.fixture
def settings(config_file, tmp_path):
    """Return DeepSpeed's configuration for overrides, and for a file where one is given."""

    def of(*overrides: str, file=None, ranks: int | None = 2):
        given = [ON, f"run_dir={tmp_path}/run", *overrides]
        if file is not None:
            path = tmp_path / "zero.json"
            path.write_text(file if isinstance(file, str) else json.dumps(file))
            given.append(f"parallel.deepspeed.config={path}")
        return deepspeed_settings(read_run_config(config_file, given), ranks)

    return of


def test_all_defaults_are_stage_2_without_clipping_or_micro_batches(settings):
    found = settings()
    assert found["zero_optimization"]["stage"] == 2
    assert found["zero_optimization"]["offload_optimizer"] == {"device": "none"}
    assert found["gradient_clipping"] == 0.0
    assert found["train_micro_batch_size_per_gpu"] == 4
    assert found["gradient_accumulation_steps"] == 1
    assert found["bf16"] == {"enabled": False}


def test_other_engines_hand_nothing_to_deepspeed(settings):
    assert settings("parallel.dense=ddp") is None
    assert settings("parallel.dense=fsdp") is None


def test_options_and_the_file_join(settings):
    zero = {"reduce_bucket_size": 1000, "overlap_comm": True, "offload_param": {"device": "cpu"}}
    found = settings(
        "parallel.deepspeed={zero_stage: 3, offload_optimizer: true}",
        file={"zero_optimization": zero, "steps_per_print": 5},
    )
    assert found["zero_optimization"] == {
        **zero,
        "stage": 3,
        "offload_optimizer": {"device": "cpu"},
        "memory_efficient_linear": False,
        "sub_group_size": settings_module.AT_ONCE,
    }
    assert found["steps_per_print"] == 5


def test_a_file_may_say_what_the_run_says_or_auto(settings):
    """Files of other trainers, which fill in ``auto``."""
    found = settings(
        file={
            "train_batch_size": 8,
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": 1.0,
            "bf16": {"enabled": "auto"},
            "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16},
            "optimizer": {
                "type": "AdamW",
                "params": {"lr": 0.003, "betas": [0.9, 0.95], "eps": "auto", "weight_decay": 0.1},
            },
            "scheduler": {"type": "auto", "params": {"warmup_num_steps": "auto"}},
            "zero_optimization": {
                "stage": 1,
                "sub_group_size": 1e9,
                "reduce_bucket_size": "auto",
                "stage3_gather_16bit_weights_on_model_save": True,
            },
        }
    )
    assert found["zero_optimization"]["stage"] == 1
    assert "reduce_bucket_size" not in found["zero_optimization"]


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ({"train_batch_size": 16}, "train_batch_size = 16, but train.batch_sequences is 8;"),
        ({"train_micro_batch_size_per_gpu": 8}, "on 2 ranks is 4;"),
        ({"gradient_accumulation_steps": 2}, "but train.accumulation is 1;"),
        ({"gradient_clipping": 0.5}, "gradient_clipping = 0.5, but optimizer.clip_norm is 1.0;"),
        ({"bf16": {"enabled": True}}, "bf16.enabled = true, but train.precision = bf16 is false;"),
        ({"fp16": {"enabled": True}}, "fp16.enabled = true, but moeyard does not do that;"),
        ({"optimizer": {"type": "Lamb"}}, 'optimizer.type = "Lamb", but'),
        ({"optimizer": {"params": {"lr": 1}}}, "params.lr = 1, but optimizer.lr is 0.003;"),
        ({"optimizer": {"params": {"bias_correction": True}}}, "leave it out of the file"),
        ({"scheduler": {"type": "WarmupLR"}}, "leave it out of the file"),
        ({"zero_optimization": {"stage": 4}}, "ZeRO stage 4, which does not exist;"),
        ({"zero_optimization": {"stage": "two"}}, "ZeRO stage two, which does not exist;"),
        ({"zero_optimization": {"round_robin_gradients": True}}, "leave the key out"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
            "moeyard has the optimizer's state in memory;",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            "which DeepSpeed does in stage 3;",
        ),
        ({"expert_parallel": {"autoep_size": 2}}, "expert_parallel.autoep_size = 2, but"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "moeyard does not do that;"),
        ("{\n'stage': 1}", "which is not JSON in line 2"),
        ("[1]", "which holds [1] and not DeepSpeed's keys;"),
    ],
)
def test_a_file_that_contradicts_the_run_is_named_with_key_value_and_remedy(settings, file, words):
    with pytest.raises(ConfigError) as refused:
        settings(file=file)
    sentence = str(refused.value)
    assert words in sentence and "; " in sentence and sentence.count("\n") == 0


DENSE = ["model.moe=null", "model.d_ff=40", "train.parameters=lora"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["parallel.dense=ddp", "parallel.deepspeed={}"], "but parallel.dense is ddp;"),
        (["parallel.gradient_slices=auto", "parallel.ep=2"], "parallel.dense is deepspeed, which"),
        (["train.precision=fp64"], "which has fp32 masters;"),
        (["train.parameters=router"], "routers are whole on every rank"),
        (["optimizer.kind=muon"], "kind is muon, which needs whole rows"),
        (["optimizer.kind=frugal"], "kind is frugal, which needs whole rows"),
        (["train.parameters=lora", "lora.targets=[experts]"], "no dense parameters to split"),
        (["train.parameters=lora", "parallel.deepspeed.zero_stage=3"], "train.parameters is lora"),
        ([*DENSE, "lora={targets: [mlp], experts: 2}"], "not been tried with LoRA experts;"),
        (["train.precision=bf16", "parallel.deepspeed.zero_stage=0"], "train.precision is bf16"),
        (["parallel.deepspeed={zero_stage: 0, offload_optimizer: true}"], "does from stage 1;"),
        (["parallel.deepspeed.config=/not/there.json"], "no such file or directory"),
        (["parallel.deepspeed.config=/"], "is a directory"),
        (["parallel.deepspeed.zero_stage=5"], "parallel.deepspeed.zero_stage"),
    ],
)
def test_options_that_do_not_go_together_are_one_sentence(settings, overrides, words):
    with pytest.raises(ConfigError) as refused:
        settings(*overrides)
    assert words in str(refused.value) and str(refused.value).count("\n") == 0


def test_a_file_and_an_option_that_differ_are_named(settings):
    with pytest.raises(ConfigError, match=r"stage = 1, but parallel.deepspeed.zero_stage is 3;"):
        settings("parallel.deepspeed.zero_stage=3", file={"zero_optimization": {"stage": 1}})


def test_one_process_is_refused_before_any_work(config_file, tmp_path, capsys):
    assert main([str(config_file), ON, f"run_dir={tmp_path}/run"]) == 2
    assert "but the run has one process" in capsys.readouterr().err
    assert not list(Path(tmp_path / "run").glob("data/*"))


def test_a_package_that_is_not_installed_is_one_sentence(config_file, tmp_path, monkeypatch):
    config = read_run_config(config_file, [ON, f"run_dir={tmp_path}/run"])
    monkeypatch.setattr(settings_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"not installed; install it with pip install 'moeyard"):
        check_deepspeed(config)
