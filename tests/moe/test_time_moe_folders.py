"""Folders of Time-MoE: the authors' names and keys, both ways, and the sizes of their models."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from moeyard.errors import ModelFileError
from moeyard.moe.config.time_moe import TimeMoeConfig
from moeyard.moe.folders.convert import convert
from moeyard.moe.folders.folder import ModelFolder
from moeyard.moe.folders.hf_config import from_hf, to_hf
from moeyard.moe.models.describe import count_parameters
from moeyard.moe.models.series_batch import batch_of_series
from moeyard.moe.models.table import build_model
from moeyard.moe.without_memory import without_memory
from moeyard.serving.experts.options import StoreOptions
from moeyard.serving.filling import fill_model

from small_series import TIME_MOE

BASE = {
    "model_type": "time_moe",
    "architectures": ["TimeMoeForPrediction"],
    "apply_aux_loss": True,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 384,
    "horizon_lengths": [1, 8, 32, 64],
    "input_size": 1,
    "intermediate_size": 1536,
    "max_position_embeddings": 4096,
    "num_attention_heads": 12,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 12,
    "num_key_value_heads": 12,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "router_aux_loss_factor": 0.02,
    "use_dense": False,
}
LARGE = {"hidden_size": 768, "intermediate_size": 3072}
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "num_experts": 3,
    "horizon_lengths": [1, 4],
}


def formula(d: int, d_ff: int, layers: int, experts: int, heads: int = 105) -> int:
    """Return the parameters: of a layer's attention, norms, experts, router and shared expert."""
    attention = 4 * d * d + 3 * d
    shared = 3 * d * d_ff + d
    routed = experts * 3 * d * d_ff // 2
    return layers * (attention + 2 * d + shared + routed + 8 * d) + 2 * d + d + heads * d


@pytest.mark.parametrize(
    ("changes", "millions"), [({}, (113.35, 49.65)), (LARGE, (453.20, 198.39))]
)
def test_released_models_have_the_published_sizes(changes, millions):
    config = from_hf(BASE | changes)
    with without_memory():
        found = count_parameters(build_model(config))
    shape = (config.d_model, config.d_ff, config.num_layers)
    assert found == (formula(*shape, 8), formula(*shape, 2))
    assert tuple(round(count / 1e6, 2) for count in found) == millions


def test_the_authors_keys_go_through(tmp_path):
    config = from_hf(BASE)
    assert config.moe.router.balance_loss == pytest.approx(0.04)  # theirs is 2 at balance
    assert config.moe.router.balance_over == "model" and not config.moe.router.renormalize
    written = to_hf(config, "bfloat16")
    assert BASE.items() <= (written | {"attention_dropout": 0.0}).items()
    kept = to_hf(config, "bfloat16", source=BASE | {"initializer_range": 0.02})
    assert kept["initializer_range"] == 0.02 and kept["attention_dropout"] == 0.0


@pytest.fixture
def folder(tmp_path):
    """A folder with the names of the released one, from their list."""
    d, d_ff, shapes = 16, 24, {}
    shapes["model.embed_layer.emb_layer"] = shapes["model.embed_layer.gate_layer"] = (d, 1)
    for layer in ("model.layers.0.", "model.layers.1."):
        for part in "qkvo":
            shapes[f"{layer}self_attn.{part}_proj"] = (d, d)
        experts = {f"experts.{n}": d_ff // 2 for n in range(3)} | {"shared_expert": d_ff}
        for name, width in experts.items():
            for part, shape in (("gate", (width, d)), ("up", (width, d)), ("down", (d, width))):
                shapes[f"{layer}ffn_layer.{name}.{part}_proj"] = shape
        shapes[f"{layer}ffn_layer.gate"] = (3, d)
        shapes[f"{layer}ffn_layer.shared_expert_gate"] = (1, d)
        shapes[f"{layer}input_layernorm"] = shapes[f"{layer}post_attention_layernorm"] = (d,)
    shapes |= {"model.norm": (d,), "lm_heads.0.out_layer": (1, d), "lm_heads.1.out_layer": (4, d)}
    torch.manual_seed(2)
    tensors = {f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    for name in [name for name in tensors if name.endswith(("q_proj.weight", "k_proj.weight"))]:
        tensors[name.replace("weight", "bias")] = torch.randn(d)
    for layer in range(2):
        tensors[f"model.layers.{layer}.self_attn.v_proj.bias"] = torch.randn(d)
    path = tmp_path / "released"
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(BASE | SMALL))
    return path


def test_a_folder_of_the_authors_is_read_and_written_with_the_same_names(folder, tmp_path):
    opened = ModelFolder(folder)
    assert opened.check() is None and opened.dtype is torch.float32
    assert opened.config == TimeMoeConfig(
        **TIME_MOE
        | {"num_kv_heads": 2, "max_positions": 4096}
        | {"moe": TIME_MOE["moe"] | {"num_experts": 3}}
    )
    assert convert(folder, tmp_path / "again") == "time_moe"
    first, second = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def reference(tensors, values_L):
    """Return what each head says after each point of one series, from the paper's formulas."""

    def weight(name):
        return tensors[f"{name}.weight"]

    def norm(x_LD, name):
        return x_LD * (x_LD.square().mean(dim=-1, keepdim=True) + 1e-6).rsqrt() * weight(name)

    def expert(x_LD, name):
        up_LF = F.silu(x_LD @ weight(f"{name}.gate_proj").T) * (x_LD @ weight(f"{name}.up_proj").T)
        return up_LF @ weight(f"{name}.down_proj").T

    def heads(x_LD, name):
        y_LD = x_LD @ weight(name).T + tensors[f"{name}.bias"]
        return y_LD.unflatten(1, (2, 8)).movedim(1, 0)  # [2, L, 8]

    def turned(x_2L8):
        places_L = torch.arange(x_2L8.shape[1])
        angles_L4 = places_L[:, None] * 10_000.0 ** (-torch.arange(4) / 4)
        first, second = x_2L8[..., :4], x_2L8[..., 4:]
        cos, sin = angles_L4.cos(), angles_L4.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    x_L1 = values_L[:, None]
    embed = "model.embed_layer."
    x_LD = F.silu(x_L1 @ weight(embed + "gate_layer").T) * (x_L1 @ weight(embed + "emb_layer").T)
    future_LL = torch.ones(len(values_L), len(values_L)).triu(1).bool()
    for layer in ("model.layers.0.", "model.layers.1."):
        normed_LD = norm(x_LD, layer + "input_layernorm")
        q, k, v = (heads(normed_LD, f"{layer}self_attn.{part}_proj") for part in "qkv")
        scores_2LL = turned(q) @ turned(k).mT / 8**0.5
        seen_2L8 = scores_2LL.masked_fill(future_LL, -torch.inf).softmax(dim=-1) @ v
        x_LD = x_LD + seen_2L8.movedim(0, 1).flatten(1) @ weight(layer + "self_attn.o_proj").T
        normed_LD = norm(x_LD, layer + "post_attention_layernorm")
        ffn = layer + "ffn_layer."
        shares_LE = (normed_LD @ weight(ffn + "gate").T).softmax(dim=-1)
        shares_LE = shares_LE * (shares_LE >= shares_LE.topk(2).values[:, -1:])
        gate_L1 = torch.sigmoid(normed_LD @ weight(ffn + "shared_expert_gate").T)
        x_LD = x_LD + gate_L1 * expert(normed_LD, ffn + "shared_expert")
        for number in range(3):
            x_LD = x_LD + shares_LE[:, number, None] * expert(normed_LD, f"{ffn}experts.{number}")
    hidden_LD = norm(x_LD, "model.norm")
    return [hidden_LD @ weight(f"lm_heads.{head}.out_layer").T for head in (0, 1)]


@torch.no_grad()
def test_a_folder_computes_the_papers_formulas(folder):
    opened = ModelFolder(folder)
    model = fill_model(
        opened, torch.float32, None, StoreOptions(), torch.device("cpu")
    ).model.eval()
    values_L = torch.randn(11, generator=torch.Generator().manual_seed(4))
    observed_BL = torch.ones(1, 11, dtype=torch.bool)
    hidden_TD = model(batch_of_series(values_L[None], observed_BL)).hidden_TD
    wanted = reference(load_file(folder / "model.safetensors"), values_L)
    for head, wanted_LH in zip(model.lm_heads, wanted, strict=True):
        torch.testing.assert_close(head(hidden_TD), wanted_LH, rtol=1e-4, atol=1e-4)
    ahead = model.predict(values_L[None], observed_BL, 4).mean_BH[0]
    torch.testing.assert_close(ahead, wanted[1][-1], rtol=1e-4, atol=1e-4)


def test_what_the_authors_code_does_not_have_is_ours_with_the_reason():
    config = TimeMoeConfig(**TIME_MOE | {"moe": TIME_MOE["moe"] | {"d_expert": 13}})
    values = to_hf(config, "float32")
    assert values["model_type"] == "moeyard" and from_hf(values) == config
    assert "moe.d_shared is 24, where time_moe has 26" in values["why_moeyard"]
    assert to_hf(TimeMoeConfig(**TIME_MOE), "float32")["model_type"] == "time_moe"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_size": 2}, "input_size = 2; only 1 is supported"),
        ({"use_dense": True}, "use_dense = True; only False is supported"),
        ({"intermediate_size": 25}, "intermediate_size = 25 and num_experts_per_tok = 2; an"),
        ({"horizon_lengths": [8, 1]}, r"horizons is \[8, 1\]"),
    ],
)
def test_folders_that_mean_something_else_are_refused(changes, message):
    with pytest.raises(ModelFileError, match=message):
        from_hf(BASE | changes)
