"""Runs that start from a folder of any family: with EP = 2 they export what they began with."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from moeyard.errors import ConfigError, DataError
from moeyard.training.checkpoints.export import export
from moeyard.training.read_config import complete_run_config, read_run_config

from hf_families import CASES, assert_same_model, save
from launch import torchrun

WORKER = Path(__file__).parent / "families_worker.py"
VOCABULARY = 260  # the bytes tokenizer has 257


@pytest.fixture(scope="module")
def runs(tmp_path_factory, config_file):
    """Every family's folder, trained by two ranks with EP = 2 for a step that changes nothing."""
    folder = tmp_path_factory.mktemp("families")
    for case in CASES:
        save(case, folder / case, vocab_size=VOCABULARY)
    folders = [str(folder / case) for case in CASES]
    torchrun(2, str(WORKER), str(config_file), str(folder / "runs"), *folders)
    return folder


@pytest.mark.dist
@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_what_two_ranks_loaded_is_exported_whole(runs, case, tmp_path):
    export(runs / "runs" / case, tmp_path / "out")
    before = AutoModelForCausalLM.from_pretrained(runs / case).eval()
    after, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(after) is type(before)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.randint(0, VOCABULARY, (2, 23), generator=torch.Generator().manual_seed(0))
    # A step of rate 1e-30 moves nothing but weights that are 0, as an embedding of padding is.
    assert_same_model(after, before, ids, moved=1e-25)


@pytest.mark.dist
@pytest.mark.parametrize("case", CASES)
def test_the_loss_of_two_ranks_is_that_of_transformers(runs, case, config_file):
    """The cross-entropy of the one step, over the same tokens."""
    from moeyard.parallel.mesh import Mesh
    from moeyard.training.data.text import build_data

    run = runs / "runs" / case
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    options = [f"run_dir={run}", f"start_from={runs / case}", "model=null"]
    config = read_run_config(config_file, options)
    data = build_data(config, run / "data", Mesh())
    windows = data.train.sequences(0, range(config.train.batch_sequences))
    theirs = AutoModelForCausalLM.from_pretrained(runs / case).eval()
    with torch.no_grad():
        logits = theirs(windows[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    assert line["loss"] == pytest.approx(float(expected), abs=1e-5)


def test_a_folder_that_does_not_fit_gets_one_sentence(tmp_path, config_file):
    from moeyard.parallel.mesh import Mesh
    from moeyard.training.trainer import Trainer

    save("qwen3_moe", tmp_path / "m", vocab_size=VOCABULARY)
    options = [f"run_dir={tmp_path}/run", f"start_from={tmp_path}/m"]
    with pytest.raises(ConfigError, match="does not exist; give a Hugging Face model folder"):
        read_run_config(config_file, [options[0], f"start_from={tmp_path}/nowhere"])
    options.append("model={num_layers: 5}")
    config = read_run_config(config_file, options)
    with pytest.raises(ConfigError, match=r"which does not fit: .* has no tensor 'model.layers.3"):
        Trainer(config, tmp_path / "run", Mesh())


def test_a_run_may_change_what_weights_do_not_depend_on(tmp_path, config_file):
    save("qwen3_moe", tmp_path / "m", vocab_size=VOCABULARY)
    change = "model={moe: {router: {lookahead: previous_block, z_loss: 0.5}}, dense_layers: [1]}"
    options = [f"run_dir={tmp_path}/run", f"start_from={tmp_path}/m", change]
    model = read_run_config(config_file, options).model
    assert model.moe.router.lookahead == "previous_block" and model.moe.router.z_loss == 0.5
    assert (model.d_model, model.moe.num_experts, model.moe.router.k) == (40, 6, 3)


def test_the_tokenizer_is_the_folders_unless_it_has_the_same_ids(tmp_path, config_file):
    from moeyard.parallel.mesh import Mesh
    from moeyard.training.data.bpe import train_bpe
    from moeyard.training.data.text import build_data
    from moeyard.training.data.tokenizer import ByteTokenizer
    from moeyard.training.stop import StopRequest

    for name in ("bytes", "bpe"):
        save("mixtral", tmp_path / name, vocab_size=400)
    ByteTokenizer().save(tmp_path / "bytes")
    texts = [["def function(x):\n    return x\n" * 50], [" ".join(map(str, range(900)))]]
    train_bpe(texts, 300, tmp_path / "bpe", StopRequest())

    def tokenizer_of(name, *options):
        given = [f"run_dir={tmp_path / 'run'}", f"start_from={tmp_path / name}", "model=null"]
        config = read_run_config(config_file, [*given, *options])
        return build_data(config, tmp_path / "data" / name, Mesh()).tokenizer

    assert tokenizer_of("bytes").vocab_size == 257  # config_file says bytes
    with pytest.raises(ConfigError, match=r"data.tokenizer is 'bytes', whose ids mean other text"):
        tokenizer_of("bpe")
    assert tokenizer_of("bpe", "data.tokenizer=null").vocab_size == 300

    save("mixtral", tmp_path / "none", vocab_size=400)
    assert tokenizer_of("none").vocab_size == 257  # config_file says bytes
    with pytest.raises(DataError, match=r"which has no tokenizer; put tokenizer\.json there, or"):
        tokenizer_of("none", "data.tokenizer=null")


def test_a_tokenizer_that_cannot_be_opened_is_no_reason_to_train_on_bytes(tmp_path):
    from moeyard.training.data.tokenizer import ByteTokenizer, check_tokenizer

    (tmp_path / "tokenizer.model").write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"tokenizer\.model|has no usable tokenizer"):
        check_tokenizer(str(tmp_path), "bytes", ByteTokenizer())
    check_tokenizer(str(tmp_path), "a folder with this tokenizer as JSON", ByteTokenizer())


def test_validation_reads_no_folder(tmp_path):
    from moeyard.configuration import validate_config
    from moeyard.training.config import RunConfig

    values = {"run_dir": "unused", "start_from": f"{tmp_path}/nowhere", "train": {"steps": 1}}
    values |= {"model": {"d_model": 32, "num_layers": 1, "num_heads": 2, "d_ff": 64}}
    assert validate_config(RunConfig, values).start_from == f"{tmp_path}/nowhere"
    with pytest.raises(ConfigError, match=r"nowhere', which cannot be used: .*does not exist"):
        complete_run_config(values)
