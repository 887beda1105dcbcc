"""Weights that config.json does not ask for are refused, or left out with a line about them."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

import moeyard
from moeyard.cli import main
from moeyard.errors import ModelFileError, MoeyardError
from moeyard.moe.folders.convert import convert
from moeyard.moe.folders.upcycle import upcycle
from moeyard.moe.models.decoder import Decoder
from moeyard.serving.serve_args import ServeArgs
from moeyard.serving.server import check_model
from moeyard.training.checkpoints.start_from import read_start
from moeyard.training.data.tokenizer import ByteTokenizer

from hf_families import save

IDS = torch.arange(8).unsqueeze(0)
UNKNOWN = {
    "bias": ("qwen3_moe", {"model.layers.0.self_attn.k_proj.bias": (20,)}, "self_attn.k_proj.bias"),
    "norm": ("mixtral", {"model.layers.1.self_attn.q_norm.weight": (10,)}, "self_attn.q_norm"),
    "router": ("olmoe", {"model.layers.1.mlp.gate.bias": (6,)}, "mlp.gate.bias"),
    "shared": ("mixtral", {"model.layers.0.mlp.shared_expert.up_proj.weight": (8, 40)}, "shared"),
    "more_experts": (
        "qwen3_moe",
        {f"model.layers.0.mlp.experts.6.{part}_proj.weight": (24, 40) for part in ("gate", "up")},
        r"has 2 weight\(s\) .*experts\.6\.",
    ),
    "twice": (
        "qwen3_moe",
        {"model.layers.0.mlp.experts.down_proj": (6, 40, 24)},
        r"experts\.down_proj",
    ),
}
KNOWN = {
    "mtp.layers.0.mlp.up_proj.weight": "further tokens",
    "model.mtp.norm.weight": "further tokens",
    "visual.blocks.0.attn.qkv.weight": "pictures",
    "model.vision_tower.patch.weight": "pictures",
    "multi_modal_projector.linear.weight": "pictures",
    "model.layers.0.self_attn.rotary_emb.inv_freq": "rotary tables",
    "model.rotary_emb.inv_freq": "rotary tables",
}


def add_weights(folder, shapes: dict) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors |= {name: torch.rand(shape) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")


def edit(folder, **changed) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def lines_of_loading(caplog) -> list[str]:
    """Return what was logged about the folder; others log at any moment, such as threads."""
    return [one.getMessage() for one in caplog.records if one.name == "moeyard.serving.loading"]


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_weight_that_nothing_asks_for_is_refused_by_name(tmp_path, name):
    case, shapes, message = UNKNOWN[name]
    save(case, tmp_path)
    plain = moeyard.load(tmp_path)(IDS)
    add_weights(tmp_path, shapes)
    with pytest.raises(ModelFileError, match=message) as caught:
        moeyard.load(tmp_path)
    assert "--ignore-unused-weights" in str(caught.value) and "\n" not in str(caught.value)
    assert torch.equal(moeyard.load(tmp_path, ignore_unused_weights=True)(IDS), plain)


def test_the_sentence_counts_all_and_names_a_few(tmp_path, caplog):
    save("mixtral", tmp_path)
    add_weights(tmp_path, {f"model.extra.{number}": (2,) for number in range(30)})
    few = r"model\.extra\.\d+, model\.extra\.\d+, model\.extra\.\d+, \.\.\."
    with pytest.raises(ModelFileError, match=rf"has 30 weight\(s\) .*\({few}\)"):
        moeyard.load(tmp_path)
    with caplog.at_level(logging.WARNING, "moeyard"):
        moeyard.load(tmp_path, ignore_unused_weights=True)
    (line,) = lines_of_loading(caplog)
    assert "(30 weights)" in line


def test_known_extras_are_left_out_with_one_line(tmp_path, caplog):
    save("qwen3_moe", tmp_path)
    plain = moeyard.load(tmp_path)(IDS)
    add_weights(tmp_path, dict.fromkeys(KNOWN, (3,)))
    with caplog.at_level(logging.WARNING, "moeyard"):
        assert torch.equal(moeyard.load(tmp_path)(IDS), plain)
    (line,) = lines_of_loading(caplog)
    for kind in set(KNOWN.values()):
        count = list(KNOWN.values()).count(kind)
        assert f"{kind} ({count} weights)" in line


def test_layers_that_predict_further_tokens_are_as_many_as_the_file_says(tmp_path):
    """They come after the model's layers; further layers belong to another model."""
    save("deepseek_v3", tmp_path, num_mtp_layers=1)
    add_weights(tmp_path, {"model.layers.3.eh_proj.weight": (4, 8)})
    moeyard.load(tmp_path)
    edit(tmp_path, num_nextn_predict_layers=0)
    with pytest.raises(ModelFileError, match=r"has num_hidden_layers = 3, but .*layers\.3\."):
        moeyard.load(tmp_path)
    moeyard.load(tmp_path, ignore_unused_weights=True)


def test_every_place_that_opens_a_folder_refuses_and_can_go_on(tmp_path, capsys):
    for case, name in (("qwen3_moe", "moe"), ("qwen3", "dense")):
        save(case, tmp_path / name, vocab_size=260)
        add_weights(tmp_path / name, {"model.layers.0.self_attn.k_proj.bias": (20,)})
        ByteTokenizer().save(tmp_path / name)
    moe, dense = tmp_path / "moe", tmp_path / "dense"
    decoder = Decoder(moeyard.load(moe, ignore_unused_weights=True).config)
    places = {
        "load": lambda **way: moeyard.load(moe, **way),
        "serve": lambda **way: check_model(ServeArgs(model=str(moe), **way)),
        "convert": lambda **way: convert(moe, tmp_path / "converted", **way),
        "upcycle": lambda **way: upcycle(dense, tmp_path / "upcycled", 4, 2, **way),
        "start_from": lambda **way: read_start(str(moe), decoder, **way),
    }
    for name, opens in places.items():
        with pytest.raises(MoeyardError, match=r"k_proj\.bias"):
            opens()
        opens(ignore_unused_weights=True)
        assert name not in ("convert",) or moeyard.load(tmp_path / "converted")
    command = ["convert", str(moe), str(tmp_path / "again")]
    assert main(command) == 2 and "k_proj.bias" in capsys.readouterr().err
    assert main([*command, "--ignore-unused-weights"]) == 0
    command = ["upcycle", str(dense), str(tmp_path / "up"), "--num-experts", "4", "--k", "2"]
    assert main([*command, "--ignore-unused-weights"]) == 0


def test_a_run_may_leave_out_what_the_folders_own_configuration_uses(tmp_path):
    """Its configuration says so, for example dense layers instead of sparse ones."""
    save("qwen3_moe", tmp_path)
    config = moeyard.load(tmp_path).config
    read_start(str(tmp_path), Decoder(config.model_copy(update={"num_layers": 2})))


def test_the_index_says_which_of_two_shards_holds(tmp_path):
    save("mixtral", tmp_path)
    plain = moeyard.load(tmp_path)(IDS)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.embed_tokens.weight"
    (tmp_path / "model.safetensors").unlink()
    other = {name: torch.zeros_like(tensors[name]), "model.layers.0.rotary_emb.inv_freq": IDS[0]}
    save_file(tensors | {"model.layers.0.rotary_emb.inv_freq": IDS[0]}, tmp_path / "a.safetensors")
    save_file(other | {"lm_head.weight": tensors["lm_head.weight"]}, tmp_path / "b.safetensors")
    index = dict.fromkeys(tensors, "a.safetensors") | {"lm_head.weight": "b.safetensors"}

    def write_index() -> None:
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))

    write_index()
    with pytest.raises(ModelFileError, match=r"inv_freq is in a.safetensors and in b.safetensors"):
        moeyard.load(tmp_path)
    index["model.layers.0.rotary_emb.inv_freq"] = "b.safetensors"
    write_index()
    assert torch.equal(moeyard.load(tmp_path)(IDS), plain)
    index[name] = "b.safetensors"
    write_index()
    assert not torch.equal(moeyard.load(tmp_path)(IDS), plain)
