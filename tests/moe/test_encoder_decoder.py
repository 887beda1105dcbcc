"""The encoder-decoder is transformers' T5 and Switch, and each target reads its own source."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file

from moeyard.errors import ModelFileError
from moeyard.moe.batch import batch_of, batch_of_rows
from moeyard.moe.config.encoder_decoder import EncoderDecoderConfig
from moeyard.moe.folders.convert import convert
from moeyard.moe.folders.folder import ModelFolder
from moeyard.moe.folders.hf_config import from_hf, to_hf
from moeyard.moe.models.encoder_decoder import EncoderDecoder
from moeyard.moe.models.initialize import initialize
from moeyard.moe.models.options import ModelOptions

from pairs import ENCODER_DECODER
from seq2seq_models import CASES, SOURCES, TARGETS, ours, ragged, save, texts, their_logits

SMALL = {name: value for name, value in ENCODER_DECODER.items() if name != "kind"}


@pytest.fixture(scope="module", params=CASES)
def folder(tmp_path_factory, request):
    """A folder of transformers, and the model in it."""
    path = tmp_path_factory.mktemp(request.param) / "model"
    return path, save(request.param, path)


@pytest.fixture
def model():
    found = EncoderDecoder(EncoderDecoderConfig(**SMALL, vocab_size=50, start_id=0)).eval()
    initialize(found, 3)
    return found


def test_logits_and_gradients_are_those_of_transformers(folder):
    path, wanted = folder
    model, sources, targets = ours(path), texts(SOURCES), texts(TARGETS, 1)
    expected = their_logits(wanted, sources, targets)
    output = model((ragged(sources), ragged(targets)))
    logits = model.logits(output.hidden_TD)
    assert expected.std() > 0.1 and len(output.routings) == len(model.moe_layers())
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    labels = torch.randint(0, 50, (sum(TARGETS),), generator=torch.Generator().manual_seed(2))
    F.cross_entropy(logits, labels).backward()
    wanted.zero_grad()
    F.cross_entropy(expected, labels).backward()
    family, right = ModelFolder(path).family, dict(wanted.named_parameters())
    for name, parameter in model.named_parameters():
        if ".experts." not in name:
            grad = right[family.tensor_name(name)].grad
            torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-5)
    for layer, moe in model.moe_layers():
        for expert in range(moe.num_experts):
            for part, own in (("up", moe.experts.fc1.grad), ("down", moe.experts.fc2.grad)):
                grad = right[family.experts.name(layer, expert, part)].grad
                grad = torch.zeros_like(own[expert]) if grad is None else grad
                torch.testing.assert_close(own[expert], grad, rtol=1e-4, atol=1e-5)


def test_a_folder_goes_through_and_opens_in_transformers(folder, tmp_path):
    path, wanted = folder
    again = tmp_path / "again"
    assert convert(path, again) == wanted.config.model_type
    found = transformers.AutoModelForSeq2SeqLM.from_pretrained(again).eval()
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    sources, targets = texts(SOURCES), texts(TARGETS, 1)
    assert torch.equal(
        their_logits(found, sources, targets), their_logits(wanted, sources, targets)
    )
    kept = json.loads((again / "config.json").read_text())
    assert kept["dropout_rate"] == 0.1  # what we do not use is kept


def test_copies_of_the_embedding_may_be_there_and_no_other_matrix(folder, tmp_path):
    path, _ = folder
    shutil.copytree(path, tmp_path / "old")
    file = tmp_path / "old" / "model.safetensors"
    tensors = load_file(file)
    for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
        tensors[name] = tensors["shared.weight"].clone()
    unread = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    tensors[unread] = torch.zeros(8, 4)
    save_file(tensors, file, metadata={"format": "pt"})
    assert "positions (1 weights)" in ModelFolder(tmp_path / "old").check()
    tensors["decoder.embed_tokens.weight"][0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelFileError, match=r"decoder\.embed_tokens\.weight differs from shared"):
        ModelFolder(tmp_path / "old").check()


@torch.no_grad()
def test_rows_with_caches_are_those_without(folder):
    model = ours(folder[0]).eval()
    sources, targets_BL = texts(SOURCES), torch.stack(texts((7,) * 10, 1))
    hidden = model.encode(ragged(sources)).hidden_TD
    wanted = [model.decode(batch_of(list(targets_BL[beam::2])), hidden, SOURCES) for beam in (0, 1)]
    caches = model.new_caches(hidden, SOURCES, targets_per_source=2, room=7)
    parts = []
    for start, stop in ((0, 3), (3, 4), (4, 7)):
        rows = batch_of(list(targets_BL[:, start:stop]))
        parts.append(model.decode(rows, None, (), caches).hidden_TD.unflatten(0, (10, -1)))
    found = torch.cat(parts, dim=1)
    for beam in (0, 1):
        torch.testing.assert_close(
            found[beam::2].flatten(0, 1), wanted[beam].hidden_TD, rtol=0, atol=1e-5
        )
    with pytest.raises(IndexError, match="8 positions in a cache for 7"):
        model.decode(batch_of(list(targets_BL[:, :1])), None, (), caches)


@torch.no_grad()
def test_a_target_sees_its_own_source_and_what_it_has_written(model):
    sources, targets = texts(SOURCES), texts(TARGETS, 1)

    def rows():
        hidden = model((ragged(sources), ragged(targets))).hidden_TD
        return hidden.split(TARGETS)

    before = rows()
    sources[4] = sources[4].clone()
    sources[4][-1] = 1
    other_source = rows()
    targets[3] = targets[3].clone()
    targets[3][6] = 1
    other_target = rows()
    for index, (old, new) in enumerate(zip(before, other_source, strict=True)):
        moved = (old - new).abs().amax(dim=1)
        assert (moved > 1e-5).all() if index == 4 else (moved < 1e-6).all()
    for index, (old, new) in enumerate(zip(other_source, other_target, strict=True)):
        moved = (old - new).abs().amax(dim=1)
        assert (moved[:6] < 1e-6).all()
        assert (moved[6:] > 1e-5).all() if index == 3 else (moved < 1e-6).all()


@torch.no_grad()
@pytest.mark.parametrize(
    ("of_sources", "of_targets"),
    [((4, 4), (6, 6)), ((3, 7, 4), (2, 2, 9)), ((1,), (1,)), ((), ())],
)
def test_batches_of_any_lengths_give_what_pairs_give_alone(model, of_sources, of_targets):
    sources, targets = texts(of_sources), texts(of_targets, 1)
    if not sources:
        empty = batch_of_rows(torch.zeros(0, 1, dtype=torch.int64))
        output = model((empty, empty))
        assert output.hidden_TD.shape == (0, 16) and len(output.routings) == 2
        return
    together = model((ragged(sources), ragged(targets))).hidden_TD
    pairs = zip(sources, targets, strict=True)
    alone = [model((batch_of([one]), batch_of([two]))).hidden_TD for one, two in pairs]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-5)


def test_recompute_changes_no_gradient(model):
    again = EncoderDecoder(model.config, ModelOptions(recompute=True))
    again.load_state_dict(model.state_dict())
    for one in (model, again):
        output = one.train()((ragged(texts(SOURCES)), ragged(texts(TARGETS, 1))))
        one.logits(output.hidden_TD).square().sum().backward()
    for (name, first), second in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(first.grad, second.grad), name


def test_first_scores_and_outputs_have_the_size_that_t5_gives_them(model):
    config = EncoderDecoderConfig(**SMALL | {"d_model": 256, "num_heads": 4}, vocab_size=300)
    wide = EncoderDecoder(config)
    initialize(wide, 0)
    output = wide((ragged(texts(SOURCES)), ragged(texts(TARGETS, 1))))
    assert 0.8 < wide.logits(output.hidden_TD).detach().std() < 1.3
    layer = wide.layers[0]
    x_TD = torch.randn(200, 256, generator=torch.Generator().manual_seed(1))
    q, k = (
        p(x_TD).unflatten(-1, (4, 64)) for p in (layer.self_attn.q_proj, layer.self_attn.k_proj)
    )
    assert 0.8 < torch.einsum("tqh,sqh->qts", q, k).detach().std() < 1.3


def test_blocks_begin_anew_with_the_target():
    config = EncoderDecoderConfig(**SMALL | {"dense_layers": [], "num_layers": 6}, vocab_size=50)
    assert [config.place(layer).index for layer in range(6)] == [0, 1, 2, 0, 1, 2]
    block = {"kind": "momentum"}
    moe = SMALL["moe"] | {"block": block}
    model = EncoderDecoder(config.model_validate(config.model_dump() | {"moe": moe})).eval()
    initialize(model, 0)
    model((ragged(texts(SOURCES)), ragged(texts(TARGETS, 1))))


@pytest.mark.parametrize("layers", [1, 3, 4])
def test_experts_are_in_the_layers_where_transformers_has_them(layers):
    for count in range(layers + 2):
        sparse = {f"num_sparse_{side}_layers": count for side in ("encoder", "decoder")}
        sizes = {"num_layers": layers, "num_decoder_layers": layers, "num_experts": 2}
        sizes |= {"d_model": 8, "d_ff": 8, "d_kv": 4, "num_heads": 2, "vocab_size": 9}
        theirs = transformers.SwitchTransformersConfig(**sizes, **sparse)
        with torch.device("meta"):
            model = transformers.SwitchTransformersForConditionalGeneration(theirs)
        blocks = [*model.encoder.block, *model.decoder.block]
        config = from_hf(theirs.to_dict())
        assert [config.is_moe(layer) for layer in range(2 * layers)] == [
            block.is_sparse for block in blocks
        ]
        again = to_hf(config, "float32")
        assert again["model_type"] == "switch_transformers" and from_hf(again) == config


def test_what_transformers_has_no_class_for_is_ours_with_the_reason(model):
    config = EncoderDecoderConfig(
        **SMALL | {"moe": SMALL["moe"] | {"activation": "swiglu"}}, vocab_size=50
    )
    values = to_hf(config, "float32")
    assert values["model_type"] == "moeyard" and from_hf(values) == config
    assert "swiglu" in values["why_moeyard"] and "switch_transformers" in values["why_moeyard"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source_layers": 4}, "source_layers is 4 of num_layers = 4; leave one layer or more"),
        ({"num_layers": 1}, "source_layers is 0 of num_layers = 1"),
        ({"num_heads": 5}, "d_model is 16, which does not split into 5 heads; set head_dim"),
        ({"max_distance": 4}, "max_distance is 4, but half of num_buckets = 8 are exact"),
        ({"start_id": 50}, "start_id is 50, but vocab_size is 50; use an id below it"),
        ({"dense_layers": [4]}, "dense_layers names layer 4"),
        (
            {"moe": SMALL["moe"] | {"router": {"kind": "topk", "lookahead": "previous_block"}}},
            "which encoder-decoders do not offer; use ffn_input",
        ),
    ],
)
def test_models_that_cannot_be_built_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        EncoderDecoderConfig(**SMALL | {"vocab_size": 50} | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feed_forward_proj": "gated-silu"}, "feed_forward_proj = 'gated-silu'; the known ones"),
        ({"is_encoder_decoder": False}, "is_encoder_decoder = False; only True"),
        ({"num_decoder_layers": 0}, "source_layers is 4 of num_layers = 4"),
    ],
)
def test_folders_that_mean_something_else_are_refused(changes, message):
    values = {"model_type": "t5", "d_model": 32, "num_layers": 4, "num_heads": 4}
    with pytest.raises(ModelFileError, match=message):
        from_hf(values | changes)
