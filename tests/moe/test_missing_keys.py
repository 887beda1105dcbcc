"""Missing keys and nulls in a config.json have the meaning that transformers gives them.

Each key of each family is removed in turn. The right value is what transformers' configuration
class writes after reading the same file. If it, or its model, fails, we raise a one-line error.
"""

import copy
import json

import pytest
import torch
import transformers

import moeyard
from moeyard.errors import ModelFileError
from moeyard.moe.config.model import ModelConfig
from moeyard.moe.folders.expert_layouts import part_shapes
from moeyard.moe.folders.families.table import FAMILIES
from moeyard.moe.folders.hf_config import from_hf, to_hf
from moeyard.moe.folders.tensor_names import dense_tensors

from hf_families import BASE, CASES, LLAMA3, YARN, save

BY_FAMILY = {
    "mixtral": "mixtral_window_tied",
    "qwen2_moe": "qwen2_moe_window",
    "qwen3_moe": "qwen3_moe_bias_window_tied",
    "olmoe": "olmoe_clip_bias",
    "deepseek_v2": "deepseek_v2_groups_yarn",
    "deepseek_v3": "deepseek_v3",
    "gpt_oss": "gpt_oss",
    "llama": "llama_bias_tied",
    "qwen3": "qwen3",
}
"""The case of each family with the most keys."""
IDS = torch.randint(0, 96, (2, 40), generator=torch.Generator().manual_seed(0))


def class_of(case: str, kind: str):
    return getattr(transformers, f"{CASES[case][0]}{kind}")


def full_values(case: str) -> dict:
    """Return a config.json with all keys of its class."""
    options = BASE | CASES[case][1] | {"output_router_logits": True, "router_aux_loss_coef": 0.03}
    return json.loads(class_of(case, "Config")(**options).to_json_string(use_diff=False))


def theirs(case: str, values: dict, runs: bool) -> dict | None:
    """Return the file that transformers makes of ``values``, or None where it fails.

    ``runs``: its model must run, too.
    """
    try:
        config = class_of(case, "Config").from_dict(copy.deepcopy(values))
        if runs:
            with torch.device("meta"):
                model = class_of(case, "ForCausalLM")(config)
            if model.num_parameters() < 1_000_000:
                with torch.no_grad():
                    class_of(case, "ForCausalLM")(config).eval()(IDS)
    except Exception:  # for any reason
        return None
    return json.loads(config.to_json_string(use_diff=False))


def meaning(config: ModelConfig) -> tuple:
    """Return the meaning of a configuration, independent of its spelling."""
    return config.architecture(), None if config.moe is None else config.moe.router


def shapes(config: ModelConfig) -> tuple:
    """Return the shapes of all weights."""
    parts = () if config.moe is None else part_shapes(config.moe, config.d_model)
    dense = [(name, tuple(tensor.shape)) for name, tensor in dense_tensors(config)]
    return dense, parts, config.moe_layers, config.moe and config.moe.num_experts


def is_refused(values: dict) -> bool:
    try:
        from_hf(values)
    except ModelFileError:
        return True
    return False


def changes(values: dict):
    """Yield a name and a config.json for each key that is missing or null."""
    family = FAMILIES[values["model_type"]]
    for key in sorted({*family.defaults, *family.aliases, "head_dim"}):
        yield f"{key} missing", {k: v for k, v in values.items() if k != key}
        yield f"{key} null", values | {key: None}


@pytest.mark.parametrize("runs", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", BY_FAMILY.values(), ids=BY_FAMILY)
def test_each_key_means_what_it_means_to_transformers(case, runs):
    wrong, full = [], full_values(case)
    for name, values in changes(full):
        expected = theirs(case, values, runs)
        try:
            found = from_hf(values)
        except ModelFileError as error:
            # The longer test covers values that the class takes but its model does not.
            is_right = expected is None or is_refused(expected) or not runs
            if "\n" in str(error) or not is_right:
                wrong.append(f"{name}: refused with {error}")
            continue
        if expected is None:  # then these weights at least must not open
            if shapes(found) == shapes(from_hf(full)):
                wrong.append(f"{name}: opens, where transformers fails")
        elif meaning(found) != meaning(from_hf(expected)):
            wrong.append(f"{name}: {meaning(found)} is not {meaning(from_hf(expected))}")
    assert not wrong, "\n".join(wrong)


def change_config(folder, drop=(), **changed) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text())
    kept = {key: value for key, value in values.items() if key not in drop}
    path.write_text(json.dumps(kept | changed))


def both_logits(folder) -> tuple[torch.Tensor, torch.Tensor]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return moeyard.load(folder)(IDS), model.eval()(IDS).logits


ROPES = {
    "scaling_first": {"rope_scaling": YARN | {"rope_theta": 700.0}},
    "theta_of_the_other_is_lost": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 50.0},
        "rope_scaling": {"type": "linear", "factor": 2.0},
    },
    "theta_at_the_top_for_scaling": {
        "rope_theta": 900.0,
        "rope_scaling": {"type": "linear", "factor": 2.0},
    },
    "theta_inside_first": {
        "rope_theta": 900.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50.0},
    },
    "theta_at_the_top": {"rope_theta": 900.0, "rope_parameters": {"rope_type": "default"}},
    "empty": {"rope_theta": 900.0, "rope_parameters": {}, "rope_scaling": {}},
    "null": {"rope_parameters": None, "rope_scaling": None},
    "original_at_the_top_first": {
        "original_max_position_embeddings": 16,
        "rope_scaling": LLAMA3,
    },
    "no_original": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "null_truncates_nothing": {"rope_scaling": YARN | {"truncate": None}},
}


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("case", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_the_key_that_counts_for_positions_is_the_one_that_counts_in_transformers(case, rope):
    values = full_values(case) | ROPES[rope]
    config = class_of(case, "Config").from_dict(copy.deepcopy(values))
    config.standardize_rope_params()  # transformers' models call this again
    expected = json.loads(config.to_json_string(use_diff=False))
    expected.pop("original_max_position_embeddings", None)  # it has moved
    assert meaning(from_hf(values)) == meaning(from_hf(expected))


SOME = [
    *(("qwen3_moe", rope) for rope in ("scaling_first", "original_at_the_top_first")),
    *(("qwen3_moe", "null_truncates_nothing"), ("gpt_oss", "null")),
]
MORE = [("qwen3_moe", rope) for rope in ROPES if ("qwen3_moe", rope) not in SOME]
MORE += [(case, "scaling_first") for case in ("mixtral", "gpt_oss", "deepseek_v3", "llama")]


@pytest.mark.parametrize(
    ("case", "rope"), [*SOME, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in MORE)]
)
def test_positions_turn_as_in_transformers(tmp_path, case, rope):
    save(case, tmp_path, head_dim=8)
    change_config(tmp_path, **ROPES[rope])
    ours, expected = both_logits(tmp_path)
    assert expected.abs().max() > 1 and (ours - expected).abs().max() <= 2e-4


@pytest.mark.parametrize(
    ("case", "drop", "options"),
    [
        ("mixtral", ("rms_norm_eps",), {"rms_norm_eps": 1e-5}),
        ("deepseek_v2_lite", ("n_shared_experts",), {}),
        ("deepseek_v3", ("n_shared_experts", "norm_topk_prob"), {}),
        ("gpt_oss_one_kind", ("layer_types", "sliding_window"), {}),
    ],
)
def test_what_is_missing_gives_the_logits_of_transformers(tmp_path, case, drop, options):
    save(case, tmp_path, **options)
    change_config(tmp_path, drop=drop)
    ours, expected = both_logits(tmp_path)
    assert expected.abs().max() > 1 and (ours - expected).abs().max() <= 2e-4


@pytest.mark.parametrize(
    ("case", "changed", "message"),
    [
        ("mixtral", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
        ("mixtral", {"rope_parameters": {"rope_type": None}}, "rope_type None"),
        ("mixtral", {"rope_theta": None, "rope_parameters": None}, "rope_theta = null"),
        ("mixtral", {"rope_parameters": {"rope_theta": None}}, "rope_theta = null"),
        ("mixtral", {"rope_scaling": [1]}, r"rope_scaling = \[1\]; use an object"),
        ("qwen3", {"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}, "use an object"),
        ("mixtral", {"rope_scaling": {"type": "linear"}}, "no 'factor'"),
        ("mixtral", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ("qwen3", {"layer_types": ["full_attention"] * 2}, "2 layer_types for num_hidden_layers"),
        ("qwen3", {"layer_types": ["chunked_attention"] * 3}, "'chunked_attention' in layer_types"),
        ("qwen3", {"use_sliding_window": False}, "but no window is in use"),
        ("gpt_oss", {"sliding_window": None}, "sliding_window = null"),
        ("gpt_oss", {"experts_per_token": 2}, "experts_per_token = 2; only 3"),
        ("deepseek_v2_lite", {"topk_method": None}, "topk_method = null"),
        ("deepseek_v3", {"num_key_value_heads": 2}, "num_key_value_heads = 2; only 4"),
    ],
)
def test_what_transformers_cannot_run_is_refused_in_a_sentence(case, changed, message):
    values = json.loads(class_of(case, "Config")(**BASE | CASES[case][1]).to_json_string())
    with pytest.raises(ModelFileError, match=message):
        from_hf(values | changed)


def test_a_folder_that_is_written_again_has_no_keys_that_go_before_ours():
    source = full_values("qwen3_moe") | {
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "original_max_position_embeddings": 16,
        "num_local_experts": 6,
    }
    config = from_hf(source)
    wider = config.model_copy(update={"rope_scaling": None})
    for changed in (config, wider):
        values = to_hf(changed, "float32", source=source)
        assert meaning(from_hf(values)) == meaning(changed)
        again = transformers.Qwen3MoeConfig.from_dict(copy.deepcopy(values))
        assert again.rope_parameters["rope_type"] == ("default" if changed is wider else "linear")
        assert again.num_experts == 6


@pytest.mark.parametrize(
    "rope, longest",
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        ({"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": 64}, 80),
        ({"rope_type": "yarn", "factor": 2.0}, 160),
        ({"rope_type": "linear", "factor": 4.0}, 80),
        (LLAMA3 | {"factor": 4.0, "original_max_position_embeddings": 64}, 80),
    ],
)
def test_yarn_takes_factor_times_the_original_positions(rope, longest):
    """The recipe of model cards adds YaRN and leaves ``max_position_embeddings`` as it was."""
    values = full_values("mixtral") | {"max_position_embeddings": 80, "rope_scaling": rope}
    assert from_hf(values).max_positions == longest
