"""Experts laid out by channel: gates are read first, then the channels that rows need."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

import moeyard
from moeyard.cli import main
from moeyard.errors import ConfigError, ExpertReadError, ModelFileError
from moeyard.kernels.trust import cpp
from moeyard.moe.batch import batch_of
from moeyard.moe.folders.channel_layout import NATIVE_EXPERTS, channels_in_group
from moeyard.moe.folders.channel_reads import ChannelReads, Run, runs_of
from moeyard.moe.folders.convert import convert
from moeyard.moe.folders.folder import ModelFolder
from moeyard.serving.engine.engine import Engine
from moeyard.serving.experts.by_channel import open_channels
from moeyard.serving.experts.options import StoreOptions
from moeyard.serving.experts.sparsity import Sparsity, owner_of, save_sparsity
from moeyard.serving.experts.tiers.live import LiveTier
from moeyard.serving.loading import load, open_model

from adapter_folders import everything, write_adapter
from small_model import CONFIG, write_random_model
from test_engine import latin, prompts, request, run

MOE = CONFIG.moe.model_copy(update={"activation": "reglu"})
WIDE = CONFIG.model_copy(update={"d_model": 264, "moe": MOE})
"""A group is one channel in fp32, and three in bf16, of which the last has two."""
EXPERT = {"float32": 3 * 20 * 264 * 4, "bfloat16": 3 * 20 * 264 * 2}
NUM_EXPERTS = 12
needs_cpp = pytest.mark.skipif(cpp().functions is None, reason="there are no C++ kernels")


def memory(count, dtype="float32"):
    return f"{count * EXPERT[dtype]}B"


def exact(**more):
    return StoreOptions(sparsity="exact", **more)


def bytes_of(store):
    return sum(layer.bytes_read for layer in store.statistics.layers.values())


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    path = tmp_path_factory.mktemp("channels") / "plain"
    write_random_model(path, WIDE)
    return path


@pytest.fixture(scope="module")
def laid(plain):
    path = plain.parent / "laid"
    assert main(["convert", str(plain), str(path), "--expert-layout", "channels"]) == 0
    return path


@pytest.fixture(scope="module")
def narrow(plain):
    """In bf16 on disk."""
    convert(plain, plain.parent / "narrow", "bf16", by_channel=True)
    return plain.parent / "narrow"


def ids(rows=2, length=9):
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(rows))


def test_a_folder_by_channel_is_the_same_model_and_can_be_converted_back(plain, laid, tmp_path):
    config = json.loads((laid / "config.json").read_text())
    assert config["model_type"] == "moeyard" and "by channel" in config["why_moeyard"]
    assert torch.equal(load(laid)(ids()), load(plain)(ids()))
    whole = load(laid, expert_memory=memory(3))  # without expert-sparsity, experts are read whole
    assert torch.equal(whole(ids()), load(plain)(ids()))
    convert(laid, tmp_path / "back")
    for name in ("model.safetensors", "expert_hashes.json"):
        assert (tmp_path / "back" / name).read_bytes() == (plain / name).read_bytes()
    convert(plain, tmp_path / "again", by_channel=True)
    name = "model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (laid / name).read_bytes()


def test_a_channel_is_its_row_of_up_and_its_column_of_down(plain, laid):
    stored, found = load_file(plain / "model.safetensors"), load_file(laid / "model.safetensors")
    expert = "model.layers.2.mlp.experts.4"
    both = (stored[f"{expert}.up_proj.weight"], stored[f"{expert}.down_proj.weight"].mT)
    assert torch.equal(found[f"{expert}.channels.weight"], torch.cat(both, dim=1))
    assert torch.equal(found[f"{expert}.gate_proj.weight"], stored[f"{expert}.gate_proj.weight"])
    assert (
        channels_in_group(264, torch.float32) == 1 and channels_in_group(264, torch.bfloat16) == 3
    )


@pytest.fixture(scope="module")
def residents(plain):
    """The model in memory, in both types."""
    return {dtype: load(plain, dtype) for dtype in EXPERT}


@pytest.mark.parametrize(
    ("name", "dtype", "count"),
    [
        ("laid", "float32", 2),
        ("laid", "float32", 5),
        ("laid", "float32", NUM_EXPERTS),
        ("narrow", "bfloat16", 2),
        pytest.param("narrow", "bfloat16", 5, marks=pytest.mark.slow),
        ("laid", "bfloat16", 5),  # stored in another type
    ],
)
def test_exact_logits_are_those_of_the_resident_model(residents, laid, narrow, name, dtype, count):
    resident, folder = residents[dtype], narrow if name == "narrow" else laid
    model, store = open_model(folder, dtype, expert_memory=memory(count, dtype), options=exact())
    store.channels.gap = 0
    for rows, length in ((1, 1), (3, 2), (2, 30)):
        assert torch.equal(model(ids(rows, length)), resident(ids(rows, length)))
    assert model.generate("1 and", 8, 0) == resident.generate("1 and", 8, 0)
    if cpp().functions is not None and name == "laid" and dtype == "float32":
        misses = sum(layer.misses for layer in store.statistics.layers.values())
        assert 0 < bytes_of(store) <= misses * EXPERT[dtype]
    store.close()


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_requests_have_the_bits_they_have_alone_in_any_batch(residents, laid, narrow, dtype):
    asked = [request(str(i), prompt, max_tokens=6) for i, prompt in enumerate(prompts(5))]
    expected = {}
    for one in asked:
        engine = Engine(residents[dtype], latin, max_num_seqs=1, prefill_chunk=16)
        expected |= run(engine, [one])[0]
    folder = narrow if dtype == "bfloat16" else laid
    model, store = open_model(folder, dtype, expert_memory=memory(4, dtype), options=exact())
    engine = Engine(model, latin, store, max_num_seqs=4, prefill_chunk=16)
    texts, _, _ = run(engine, asked, stagger=2)
    store.close()
    assert texts == expected


@needs_cpp
@pytest.mark.parametrize("reader", ["buffered", "direct"])
def test_the_counted_bytes_are_the_gates_and_the_channels_that_the_rows_need(
    residents, laid, reader
):
    """One row: a layer reads the gates of two experts, then each channel whose gate is above 0."""
    model, store = open_model(laid, expert_memory="100%", options=exact(reader=reader))
    store.channels.gap = 0
    seen = []
    resident = residents["float32"]
    hooks = [
        layer.experts.register_forward_hook(lambda e, args, _: seen.append((e, *args[:2])))
        for _, layer in resident.decoder.moe_layers()
    ]
    resident(ids(1, 1))
    for hook in hooks:
        hook.remove()
    model(ids(1, 1))
    live = 0
    for experts, x_ND, experts_NK in seen:
        for expert in experts_NK.flatten().tolist():
            live += int((x_ND @ experts.fc1[expert, :20].mT > 0).sum())
    channel = 2 * 264 * 4
    assert 0 < live < 4 * 20
    assert bytes_of(store) == 4 * 20 * 264 * 4 + live * channel
    layers = store.statistics.layers.values()
    assert sum(layer.channel_bytes for layer in layers) == live * channel
    assert sum(layer.filled for layer in layers) == 4
    before = bytes_of(store)
    model(ids(1, 1))  # all that it needs is here
    assert bytes_of(store) == before
    model(ids(2, 9))
    layers = store.statistics.layers.values()
    gates = sum(layer.misses for layer in layers) * 20 * 264 * 4
    assert before < bytes_of(store) <= gates * 3
    assert store.rates.bytes["disk"] == bytes_of(store)
    store.close()


def thresholds(model, score):
    """Return limits that leave out about half of the channels, without measuring."""
    keys = [(layer, "gate") for layer, _ in model.decoder.moe_layers()]
    norms = {key: torch.rand(6, 20) + 0.5 for key in keys} if score == "chess" else {}
    limits = {key: torch.full((6,), 0.5) for key in keys}
    return Sparsity(score, 0.5, owner_of(model.decoder), limits, norms)


@needs_cpp
@pytest.mark.parametrize("score", [pytest.param("cats", marks=pytest.mark.slow), "chess"])
def test_thresholds_of_gates_leave_channels_on_the_disk(tmp_path, score):
    """They are lossy: the answer is that of the same mode in memory."""
    write_random_model(tmp_path / "plain", WIDE.model_copy(update={"moe": CONFIG.moe}))
    convert(tmp_path / "plain", tmp_path / "laid", by_channel=True)
    dense = load(tmp_path / "plain")
    save_sparsity(tmp_path / "file", thresholds(dense, score))
    expected = load(tmp_path / "plain", expert_sparsity=tmp_path / "file")
    options = StoreOptions(sparsity=str(tmp_path / "file"))
    model, store = open_model(tmp_path / "laid", expert_memory=memory(4), options=options)
    store.channels.gap = 0
    assert torch.equal(model(ids(1, 1)), expected(ids(1, 1)))
    assert bytes_of(store) < 0.8 * 4 * EXPERT["float32"]
    assert torch.equal(model(ids(2, 9)), expected(ids(2, 9)))
    assert not torch.equal(expected(ids(2, 9)), dense(ids(2, 9)))
    store.close()


def test_rows_with_updates_of_experts_read_all_channels(plain, laid, tmp_path):
    """The gate of such a row is not that of the expert alone."""
    adapter = write_adapter(tmp_path / "a", everything(WIDE, rank=1), r=1)
    found = []
    for folder, options in ((plain, {}), (laid, {"expert_sparsity": "exact"})):
        size = memory(4) if options else None
        model = moeyard.load(folder, expert_memory=size, adapters={"a": adapter}, **options)
        rows = [torch.tensor(prompt) for prompt in prompts(2)]
        of = [None, model.adapters.get("a")]
        with torch.inference_mode():
            found.append(model.decoder(batch_of(rows, adapters=of)).hidden_TD)
    assert torch.equal(*found)


def damage(folder, layer, expert, byte):
    """Change a byte of an expert's channels, or, below 0, of its gate."""
    files = ModelFolder(folder)
    place = NATIVE_EXPERTS.place_of_channels(files.files, layer, expert)
    files.close()
    status = place.file.path.stat()
    with place.file.path.open("r+b") as file:
        file.seek(place.entry.start + byte)
        old = file.read(1)[0]
        file.seek(place.entry.start + byte)
        file.write(bytes([old ^ 64]))
    os.utime(place.file.path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize(
    ("byte", "sentence"),
    [
        (3, "channels 0 to 2 of expert 1 of layer 2 have other bytes in model.safetensors"),
        pytest.param(
            20 * 264 * 4 - 1,
            "channels 18 to 19 of expert 1 of layer 2 have other bytes in",
            marks=pytest.mark.slow,
        ),
        (-1, "expert 1 of layer 2 has other bytes in model.safetensors than channel_hashes says"),
    ],
)
def test_a_damaged_group_is_one_error_that_names_it(narrow, tmp_path, byte, sentence):
    shutil.copytree(narrow, tmp_path / "m")
    damage(tmp_path / "m", 2, 1, byte)
    model, store = open_model(tmp_path / "m", expert_memory=memory(3, "bfloat16"), options=exact())
    with pytest.raises(ExpertReadError, match=sentence) as caught:
        for step in range(8):
            model(ids(step + 1, 20))
    assert caught.value.experts == (1,) and "try again" not in str(caught.value)
    (tmp_path / "m/model.safetensors").write_bytes((narrow / "model.safetensors").read_bytes())
    assert torch.equal(model(ids()), load(narrow)(ids()))  # the store is as it should be
    store.close()
    damage(tmp_path / "m", 2, 1, byte)
    with pytest.raises(ModelFileError, match="expert 1 of layer 2 has other bytes"):
        load(tmp_path / "m")


def test_options_that_do_not_fit_are_refused(laid, plain, tmp_path):
    files = ModelFolder(laid)
    for name, value, reason in (
        ("log", tmp_path / "log", "expert-log is .* and a log knows whole experts"),
        ("host_memory", "1GiB", "host-memory is '1GiB' and host memory keeps whole experts"),
        ("fallback", tmp_path, "expert-fallback is .* and copies stand in for whole experts"),
        ("live", LiveTier(), "follow is .* and updates bring whole experts"),
    ):
        with pytest.raises(ConfigError, match=f"laid out by channel, but {reason}"):
            open_channels(files, exact(**{name: value}), Sparsity())
    with pytest.raises(ConfigError, match="teal does not judge channels by their gate alone"):
        open_channels(files, StoreOptions(sparsity="FILE"), Sparsity("teal"))
    assert open_channels(files, StoreOptions(log=tmp_path / "log"), None) is None
    assert open_channels(ModelFolder(plain), exact(log=tmp_path / "log"), Sparsity()) is None
    files.close()


def test_models_that_have_no_gate_or_few_bits_are_not_laid_out(plain, tmp_path, capsys):
    out = tmp_path / "out"
    for dtype in ("int8", "int4", "mixed", "int4_sparse", "2:4"):
        asked = ["--dtype", dtype, "--expert-layout", "channels"]
        if dtype in ("mixed", "int4_sparse"):
            asked += ["--calibration", str(plain)]  # no text, so nothing was calibrated
        assert main(["convert", str(plain), str(out), *asked]) == 2
        sentence = f"--dtype {dtype}, but only experts in fp32 or bf16 have channels"
        assert sentence in capsys.readouterr().err
    with pytest.raises(ConfigError, match="channels, but only experts in fp32 or bf16"):
        convert(plain, out, "int8", by_channel=True)
    for update, sentence in (
        ({"activation": "relu"}, "activation relu have no gate"),
        ({"expert_bias": True}, "the experts have biases"),
    ):
        moe = MOE.model_copy(update=update)
        write_random_model(tmp_path / sentence, CONFIG.model_copy(update={"moe": moe}))
        with pytest.raises(ConfigError, match=sentence):
            convert(tmp_path / sentence, out, by_channel=True)
    assert not out.exists()


def test_runs_join_neighbours_and_read_short_gaps_along(laid):
    assert runs_of([0, 1, 4, 9], 0) == [Run(0, 2), Run(4, 5), Run(9, 10)]
    assert runs_of([0, 1, 4, 9], 2) == [Run(0, 5), Run(9, 10)]
    assert runs_of([], 3) == []
    files = ModelFolder(laid)
    reads = ChannelReads(files)
    assert reads.num_groups == 20 and reads.num_bytes(Run(18, 20)) == 2 * 2 * 264 * 4
    files.close()
