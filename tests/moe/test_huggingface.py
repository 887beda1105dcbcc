"""Against transformers: each side opens the folders of the other."""

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import moeyard
from moeyard.errors import ConfigError, ModelFileError
from moeyard.moe.batch import batch_of, batch_of_rows
from moeyard.moe.config.model import ModelConfig
from moeyard.moe.config.moe import MoEConfig
from moeyard.moe.folders.hf_config import from_hf, to_hf
from moeyard.moe.routers.hash import Hash
from moeyard.moe.routers.topk import TopK

from small_model import write_decoder

SHAPES = {
    "plain": {"num_key_value_heads": 2, "tie_word_embeddings": False, "norm_topk_prob": True},
    "tied": {"num_key_value_heads": 4, "tie_word_embeddings": True, "norm_topk_prob": False},
    "dense_layer": {
        "num_key_value_heads": 1,
        "tie_word_embeddings": False,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
    "wide_heads": {"num_key_value_heads": 2, "tie_word_embeddings": False, "head_dim": 24},
}


def qwen3_moe(**options) -> Qwen3MoeForCausalLM:
    torch.manual_seed(1)
    config = Qwen3MoeConfig(
        **{
            "vocab_size": 97,
            "hidden_size": 40,
            "intermediate_size": 56,
            "moe_intermediate_size": 24,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "head_dim": 10,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 256,
            "initializer_range": 0.2,
            "rope_theta": 5000.0,
            "eos_token_id": 96,
            **options,
        }
    )
    return Qwen3MoeForCausalLM(config).eval()


@pytest.fixture(scope="module", params=SHAPES, ids=str)
def pair(request, tmp_path_factory):
    """A transformers model and ours, opened from the folder it saved."""
    theirs = qwen3_moe(**SHAPES[request.param])
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    return theirs, moeyard.load(folder)


@torch.no_grad()
def test_logits_agree_with_transformers_to_1e_4(pair):
    theirs, ours = pair
    ids = torch.randint(0, 97, (3, 41), generator=torch.Generator().manual_seed(0))
    expected = theirs(ids).logits
    assert (ours(ids) - expected).abs().max() <= 1e-4
    assert expected.abs().max() > 1


@torch.no_grad()
def test_64_greedy_tokens_agree_with_transformers(pair):
    theirs, ours = pair
    ids = torch.randint(0, 96, (1, 9), generator=torch.Generator().manual_seed(2))
    expected = theirs.generate(ids, max_new_tokens=64, do_sample=False)
    assert torch.equal(ours.generate(ids, max_new_tokens=64, temperature=0), expected)


@torch.no_grad()
def test_ragged_batches_and_caches_give_the_logits_of_whole_sequences(pair):
    _, ours = pair
    decoder = ours.decoder
    g = torch.Generator().manual_seed(3)
    sequences = [torch.randint(0, 97, (length,), generator=g) for length in (17, 5, 30)]
    whole = [ours(s.unsqueeze(0))[0] for s in sequences]
    ragged = decoder.logits(decoder(batch_of(sequences)).hidden_TD).split([17, 5, 30])
    caches = [decoder.new_cache() for _ in sequences]
    pieces = [[], [], []]
    for start, end in ((0, 3), (3, 4), (4, 5), (5, 30)):
        parts = [s[start:end] for s in sequences]
        active = [i for i, p in enumerate(parts) if len(p)]
        batch = batch_of([parts[i] for i in active], [caches[i] for i in active])
        logits = decoder.logits(decoder(batch).hidden_TD).split(batch.lengths)
        for i, rows in zip(active, logits, strict=True):
            pieces[i].append(rows)
    for expected, flat, cached in zip(whole, ragged, pieces, strict=True):
        torch.testing.assert_close(flat, expected, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(torch.cat(cached), expected, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_a_dense_qwen3_opens_too(tmp_path):
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
    )
    theirs = Qwen3ForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "m")
    ids = torch.randint(0, 50, (2, 12))
    assert (moeyard.load(tmp_path / "m")(ids) - theirs(ids).logits).abs().max() <= 1e-4


def test_configuration_survives_the_round_trip():
    moe = MoEConfig(num_experts=4, d_expert=8, router=TopK(k=2, balance_loss=0.02))
    config = ModelConfig(
        vocab_size=30,
        d_model=16,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        d_ff=20,
        dense_layers=(0,),
        moe=moe,
    )
    values = json.loads(json.dumps(to_hf(config, "float32", {"eos_token_id": 0})))
    assert values["model_type"] == "qwen3_moe" and from_hf(values) == config


@pytest.mark.parametrize(
    ("moe", "reason"),
    [
        (MoEConfig(num_experts=4, d_expert=8, router=Hash()), "router is hash"),
        (MoEConfig(num_experts=4, d_expert=8, d_shared=8), "moe.d_shared is 8"),
    ],
    ids=["hash", "shared"],
)
def test_what_qwen3_cannot_say_is_written_as_moeyard_with_the_reason(moe, reason):
    config = ModelConfig(vocab_size=30, d_model=16, num_layers=1, num_heads=2, moe=moe)
    values = json.loads(json.dumps(to_hf(config, "float32", {"eos_token_id": 0})))
    assert values["model_type"] == "moeyard" and reason in values["why_moeyard"]
    assert from_hf(values) == config


def damage_config(**changes):
    def apply(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return apply


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def rewrite(folder, change):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def drop_a_tensor(folder):
    rewrite(folder, lambda tensors: tensors.pop("model.layers.0.mlp.experts.3.up_proj.weight"))


def make_pipe(folder):
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")


DAMAGES = {
    "no_config": (lambda f: (f / "config.json").unlink(), "config.json cannot be read"),
    "config_not_json": (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
    "no_weights": (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
    "pickle_only": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "convert them with",
    ),
    "cut_short": (truncate, "is cut short"),
    "header_cut": (
        lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 20),
        "is not a complete safetensors file",
    ),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "not a complete safetensors"),
    "tensor_missing": (drop_a_tensor, "has no tensor 'model.layers.0.mlp.experts.3.up_proj"),
    "unknown_type": (damage_config(model_type="gpt9"), "the known ones are qwen3_moe"),
    "bias_without_weights": (damage_config(attention_bias=True), "has no tensor .*q_proj.bias"),
    "contradiction": (damage_config(moe_intermediate_size=32), "config.json asks for"),
    "unsupported": (damage_config(hidden_act="gelu"), "only 'silu' is supported"),
    "no_head": (
        lambda f: rewrite(f, lambda t: t.pop("lm_head.weight")),
        "has no tensor 'lm_head.weight'",
    ),
    "text_for_a_number": (damage_config(num_hidden_layers="3"), "value of the wrong type"),
    "no_choices": (damage_config(num_experts_per_tok=None), "num_experts_per_tok = null; give"),
    "no_step": (damage_config(decoder_sparse_step=0), "decoder_sparse_step = 0; use 1"),
    "rope_list": (
        damage_config(rope_parameters=[1]),
        r"has rope_parameters = \[1\]; use an object",
    ),
    "absurd_vocabulary": (
        damage_config(vocab_size=10**12),
        "config.json: vocab_size is 1000000000000; it should be less than",
    ),
    "absurd_width": (
        damage_config(hidden_size=2**40),
        "config.json: hidden_size is 1099511627776; it should be less than or equal to 16777216.",
    ),
    "absurd_length": (
        damage_config(max_position_embeddings=10**12),
        "max_position_embeddings is 1000000000000; it should be less",
    ),
    "fewer_layers": (
        damage_config(num_hidden_layers=1),
        "has num_hidden_layers = 1, but the weights have model.layers.1.",
    ),
    "tied_by_mistake": (
        damage_config(tie_word_embeddings=True),
        "tie_word_embeddings = true, but lm_head.weight differs from",
    ),
    "quantized_by_yes": (damage_config(quantization_config="yes"), "quantization_config = 'yes'"),
    "absurd_layers": (damage_config(num_hidden_layers=10**9), "the most is 10000"),
    "absurd_sparse_layers": (
        damage_config(num_hidden_layers=10**9, decoder_sparse_step=2),
        "the most is 10000",
    ),
    "deep_json": (lambda f: (f / "config.json").write_text("[" * 200_000), "is not JSON"),
    "bad_eos": (
        lambda f: (f / "generation_config.json").write_text('{"eos_token_id": "</s>"}'),
        "generation_config.json has eos_token_id '</s>'; use an id",
    ),
    "pipe": (make_pipe, "is not a file"),
    "index_list": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": [1]}'),
        "has no weight_map",
    ),
    "index_parent": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"x": ".."}}'),
        "which is not in the folder",
    ),
    "index_outside": (
        lambda f: (f / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"x": "../secret.safetensors"}})
        ),
        "which is not in the folder",
    ),
}


@pytest.mark.parametrize("memory", [None, "50%"], ids=["resident", "offloaded"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_gets_one_sentence(tmp_path, damage, memory):
    qwen3_moe(num_key_value_heads=2).save_pretrained(tmp_path / "m")
    apply, message = DAMAGES[damage]
    apply(tmp_path / "m")
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(ModelFileError, match=message) as caught:
        moeyard.load(tmp_path / "m", expert_memory=memory)
    assert len(list(Path("/proc/self/fd").iterdir())) == before, "a file was left open"
    assert "\n" not in str(caught.value)


def test_a_tied_head_may_be_stored_twice(tmp_path):
    theirs = qwen3_moe(num_key_value_heads=2, tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path / "m")

    def store_head(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    rewrite(tmp_path / "m", store_head)
    ids = torch.randint(0, 97, (1, 8))
    with torch.no_grad():
        assert (moeyard.load(tmp_path / "m")(ids) - theirs(ids).logits).abs().max() <= 1e-4


def test_a_type_that_is_not_offered_is_the_files(tmp_path):
    qwen3_moe(num_key_value_heads=2).save_pretrained(tmp_path / "m")
    for name in ("float8_e4m3fn", ["bfloat16"]):
        damage_config(dtype=name)(tmp_path / "m")
        with pytest.raises(ConfigError, match=r"config.json has dtype .*, which is not offered"):
            moeyard.load(tmp_path / "m")
        assert moeyard.load(
            tmp_path / "m", dtype="float32"
        ).decoder.norm.weight.dtype.is_floating_point


def test_a_folder_of_many_shards_opens(tmp_path):
    theirs = qwen3_moe(num_key_value_heads=2)
    theirs.save_pretrained(tmp_path / "m", max_shard_size="20KB")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 3
    ids = torch.randint(0, 97, (1, 8))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    with torch.no_grad():
        assert (moeyard.load(tmp_path / "m")(ids) - again(ids).logits).abs().max() <= 1e-4


@pytest.mark.parametrize("memory", [None, "50%"], ids=["resident", "offloaded"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda shard: shard.unlink(), r"cannot be opened \(No such file"),
        (lambda shard: shard.write_bytes(shard.read_bytes()[:-1]), "is cut short"),
        (lambda shard: shard.write_bytes(b""), "not a complete safetensors file"),
    ],
    ids=["missing", "truncated", "empty"],
)
def test_a_shard_that_is_not_whole_gets_one_sentence(tmp_path, damage, message, memory):
    qwen3_moe(num_key_value_heads=2).save_pretrained(tmp_path / "m", max_shard_size="20KB")
    damage(sorted((tmp_path / "m").glob("*.safetensors"))[2])
    with pytest.raises(ModelFileError, match=message) as caught:
        moeyard.load(tmp_path / "m", expert_memory=memory)
    assert "\n" not in str(caught.value)


def test_a_hash_table_that_names_no_expert_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    from moeyard.moe.models.decoder import Decoder

    moe = MoEConfig(num_experts=4, d_expert=8, router=Hash())
    config = ModelConfig(vocab_size=30, d_model=16, num_layers=1, num_heads=2, moe=moe)
    write_decoder(tmp_path / "m", Decoder(config), eos_id=0)
    assert moeyard.load(tmp_path / "m").config == config
    tensors = load_file(tmp_path / "m/model.safetensors")
    tensors["model.layers.0.mlp.gate.table_VK"][3] = 4
    save_file(tensors, tmp_path / "m/model.safetensors")
    with pytest.raises(ModelFileError, match=r"names experts from . to 4, but there are 4"):
        moeyard.load(tmp_path / "m")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": -1}, "temperature is -1"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"max_new_tokens": -3}, "max_new_tokens is -3"),
        ({"seed": 2**64}, "seed 18446744073709551616"),
        ({"max_new_tokens": 250}, "the model takes 256"),
    ],
)
def test_generate_refuses_what_makes_no_sense(tmp_path, options, message):
    from moeyard.errors import ConfigError

    qwen3_moe(num_key_value_heads=2).save_pretrained(tmp_path / "m")
    model = moeyard.load(tmp_path / "m")
    with pytest.raises(ConfigError, match=message):
        model.generate(torch.zeros(1, 9, dtype=torch.int64), **options)
    with pytest.raises(ConfigError, match="both above 0"):
        model.generate(torch.zeros(0, 9, dtype=torch.int64))
    with pytest.raises(ConfigError, match=r"ids range from 0 to 97; they must be in \[0, 97\)"):
        model(torch.tensor([[0, 97]]))


def test_uniform_rows_are_a_batch_of_sequences():
    ids = torch.arange(6).view(2, 3)
    batch = batch_of_rows(ids)
    assert batch.lengths == (3, 3) and batch.positions_T.tolist() == [0, 1, 2, 0, 1, 2]
