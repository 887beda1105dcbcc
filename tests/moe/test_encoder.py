"""The encoder is transformers' BERT, and reads each text alone, in both directions."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import moeyard
from moeyard.errors import ConfigError, ModelFileError
from moeyard.moe.batch import batch_of
from moeyard.moe.config.encoder import EncoderConfig
from moeyard.moe.config.kinds import read_model
from moeyard.moe.config.model import ModelConfig
from moeyard.moe.folders.convert import convert
from moeyard.moe.folders.folder import ModelFolder
from moeyard.moe.folders.hf_config import from_hf, to_hf
from moeyard.moe.folders.marked_texts import MarkedTexts
from moeyard.moe.folders.upcycle import upcycle
from moeyard.moe.models.documents import batch_of_lengths
from moeyard.moe.models.initialize import initialize
from moeyard.moe.models.options import ModelOptions
from moeyard.moe.models.table import build_model
from moeyard.training.data.tokenizer import FolderTokenizer

LENGTHS = (5, 1, 17, 9, 30, 17, 24)
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "sea", "is", "salt", "##y", "red"]
SMALL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 44,
    "max_position_embeddings": 40,
    "initializer_range": 0.2,
    "num_labels": 3,
}
MOE = {"num_experts": 6, "d_expert": 20, "router": {"kind": "topk", "k": 2}}
SIZES = {"d_model": 32, "num_layers": 3, "num_heads": 4, "d_ff": 44, "vocab_size": 50}


def bert(kind="ForSequenceClassification", **changes):
    torch.manual_seed(7)
    config = transformers.BertConfig(**SMALL | changes)
    model = getattr(transformers, f"Bert{kind}")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def texts(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(5, 50, (length,), generator=generator) for length in LENGTHS]


def padded(rows):
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long()


def ragged(rows):
    return batch_of_lengths(torch.cat(rows), torch.tensor([len(row) for row in rows]).numpy())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("bert") / "model"
    bert().save_pretrained(path)
    return path


@pytest.fixture
def encoder():
    config = EncoderConfig(**SIZES, labels=("a", "b"), max_positions=40, moe=MOE)
    model = build_model(config).eval()
    initialize(model, 3)
    return model


@torch.no_grad()
def test_logits_are_those_of_transformers_with_a_mask(folder):
    theirs = bert()
    ids, mask = padded(texts())
    wanted = theirs(ids, attention_mask=mask)
    model = moeyard.load_classifier(folder)
    batch = ragged(texts())
    hidden = model.encoder(batch).hidden_TD
    body = theirs.bert(ids, attention_mask=mask)
    torch.testing.assert_close(hidden, body.last_hidden_state[mask.bool()], rtol=0, atol=1e-5)
    pooled = model.encoder.pooled(hidden, batch.lengths)
    torch.testing.assert_close(pooled, body.pooler_output, rtol=0, atol=1e-5)
    logits = model.encoder.logits(hidden, batch.lengths)
    assert wanted.logits.std() > 0.1
    torch.testing.assert_close(logits, wanted.logits, rtol=0, atol=1e-5)
    shares = model.probabilities([row.tolist() for row in texts()])
    torch.testing.assert_close(shares, wanted.logits.softmax(dim=1), rtol=0, atol=1e-5)


def test_gradients_are_those_of_transformers(folder):
    theirs, ids_and_mask = bert(), padded(texts())
    labels = torch.tensor([0, 1, 2, 1, 0, 2, 1])
    theirs(ids_and_mask[0], attention_mask=ids_and_mask[1], labels=labels).loss.backward()
    encoder = build_model(ModelFolder(folder).config)
    for name, parameter in encoder.named_parameters():
        ModelFolder(folder).read_into(name, parameter.data)
    batch = ragged(texts())
    logits = encoder.logits(encoder(batch).hidden_TD, batch.lengths)
    torch.nn.functional.cross_entropy(logits, labels).backward()
    family, wanted = ModelFolder(folder).family, dict(theirs.named_parameters())
    for name, parameter in encoder.named_parameters():
        expected = wanted[family.tensor_name(name)].grad
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_row_sees_its_own_text_in_both_directions_and_no_other(encoder):
    rows = texts()
    before = encoder(ragged(rows)).hidden_TD.split(LENGTHS)
    rows[4] = rows[4].clone()
    rows[4][-1] = 3
    after = encoder(ragged(rows)).hidden_TD.split(LENGTHS)
    for index, (old, new) in enumerate(zip(before, after, strict=True)):
        if index == 4:
            assert ((old - new).abs().amax(dim=1) > 1e-4).all()  # the first row too
        else:
            torch.testing.assert_close(old, new, rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(4, 4, 4), (3, 7, 4, 8), (1,), (9, 9, 40)])
def test_batches_of_any_lengths_give_what_texts_give_alone(encoder, lengths):
    rows = [torch.randint(0, 50, (length,)) for length in lengths]
    together = encoder(ragged(rows)).hidden_TD
    alone = torch.cat([encoder(batch_of([row])).hidden_TD for row in rows])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_recompute_changes_no_gradient(encoder):
    again = build_model(encoder.config, ModelOptions(recompute=True))
    again.load_state_dict(encoder.state_dict())
    for model in (encoder, again):
        batch = ragged(texts())
        model.train().logits(model(batch).hidden_TD, batch.lengths).square().sum().backward()
    for (name, one), two in zip(encoder.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad), name


def test_a_bert_folder_goes_through_and_opens_in_transformers(folder, tmp_path):
    assert convert(folder, tmp_path / "again") == "bert"
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "again")
    for name, tensor in bert().state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    kept = json.loads((tmp_path / "again" / "config.json").read_text())
    assert kept["hidden_dropout_prob"] == 0.1  # what we do not use is kept


@pytest.mark.parametrize(
    ("change", "replacement"),
    [("bert.", ""), ("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")],
)
def test_names_of_other_releases_are_read(folder, tmp_path, change, replacement):
    shutil.copytree(folder, tmp_path / "old")
    path = tmp_path / "old" / "model.safetensors"
    renamed = {name.replace(change, replacement): t for name, t in load_file(path).items()}
    save_file(renamed, path, metadata={"format": "pt"})
    ids = [row.tolist() for row in texts()]
    old, new = (moeyard.load_classifier(p).probabilities(ids) for p in (tmp_path / "old", folder))
    assert torch.equal(old, new)


def test_the_heads_of_pre_training_are_left_out(tmp_path):
    bert("ForPreTraining").save_pretrained(tmp_path / "m")
    opened = ModelFolder(tmp_path / "m")
    assert opened.config.labels == () and "another task's head" in opened.check()
    with pytest.raises(ConfigError, match="no head for labels, so it cannot classify; train one"):
        moeyard.load_classifier(tmp_path / "m")


def test_an_encoder_with_experts_is_ours_with_the_reason(encoder):
    values = to_hf(encoder.config, "float32")
    assert values["model_type"] == "moeyard" and from_hf(values) == encoder.config
    assert values["why_moeyard"].startswith("bert models have no experts")
    assert values["id2label"] == {"0": "a", "1": "b"}


def test_configurations_without_a_kind_are_decoders():
    config = read_model({"d_model": 32, "num_layers": 1, "num_heads": 4, "d_ff": 8})
    assert isinstance(config, ModelConfig) and "kind" not in config.architecture()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, "d_model is 32, which does not split into 5 heads"),
        ({"labels": ["a"]}, "labels has 1 entries"),
        ({"labels": ["a", "b", "a"]}, "labels has 3 entries, 2 different"),
        ({"d_ff": None}, "d_ff is missing"),
        ({"dense_layers": [3], "moe": MOE}, "dense_layers names layer 3"),
        (
            {"moe": MOE | {"router": {"kind": "topk", "lookahead": "previous_block"}}},
            "which encoders do not offer; use ffn_input",
        ),
    ],
)
def test_encoders_that_cannot_be_built_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        EncoderConfig(**SIZES | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu_new"}, "hidden_act = 'gelu_new'; only 'gelu' is supported"),
        ({"position_embedding_type": "relative_key"}, "only 'absolute' is supported"),
        ({"is_decoder": True}, "is_decoder = True; only False"),
        ({"problem_type": "regression"}, "only 'single_label_classification' is supported"),
        ({"id2label": {"0": "a", "2": "b"}}, "id2label with 2 labels, but none for 1"),
        ({"id2label": ["a", "b"]}, "give an object with a name for each"),
        ({"id2label": None, "num_labels": 1}, "num_labels = 1; use a whole number from 2"),
    ],
)
def test_bert_folders_that_mean_something_else_are_refused(folder, changes, message):
    values = json.loads((folder / "config.json").read_text())
    with pytest.raises(ModelFileError, match=message):
        from_hf(values | changes)


def test_an_encoder_cannot_be_upcycled_or_continue_a_text(folder, tmp_path):
    with pytest.raises(ConfigError, match="the model is of kind encoder, and this works with"):
        upcycle(folder, tmp_path / "moe", 4, 2)
    from moeyard.serving.loading import open_model

    with pytest.raises(ConfigError, match="an encoder, but a decoder is needed here; give one"):
        open_model(folder)


def test_texts_have_the_marks_that_transformers_puts_around_them(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    tokenizer = transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    tokenizer.save_pretrained(tmp_path / "t")
    (tmp_path / "t" / "config.json").write_text('{"model_type": "bert"}')
    some = ["the salty sea is red", "the sea", "blue salt"]
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path / "t")
    for length in (4, 16):
        found = MarkedTexts(tmp_path / "t").encode(some, length)
        wanted = reference(some, truncation=True, max_length=length)["input_ids"]
        assert [ids for ids, _ in found] == wanted
        assert [cut for _, cut in found] == [length == 4, False, False]
    of_training = FolderTokenizer(tmp_path / "t")
    own = of_training.marks.around(of_training.encode(some[0]).tolist(), 16)
    assert own == wanted[0] and of_training.eos_id == WORDS.index("[SEP]")
