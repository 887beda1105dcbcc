"""Folders are whole or absent, streamed, and what safetensors and transformers read."""

import json
import os
import resource
import signal
import subprocess
import sys
import weakref
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from moeyard.errors import ModelFileError
from moeyard.moe.folders.safetensors_file import SafetensorsFile
from moeyard.moe.folders.writer import TensorPlan, write_model_folder

from hf_families import assert_same_model
from launch import environment

G = torch.Generator().manual_seed(4)
TENSORS = {
    "odd": torch.randint(0, 255, (7,), dtype=torch.uint8, generator=G),
    "half": torch.randn(3, 5, generator=G).bfloat16(),
    "wide": torch.randn(2, 3, 4, generator=G, dtype=torch.float64),
    "scalar": torch.tensor(2.5),
    "nothing": torch.zeros(0, 4),
    "größe": torch.randint(-9, 9, (4, 1), dtype=torch.int64, generator=G),
    "flag": torch.tensor([True, False, True]),
}


def plan_of(name, tensor):
    """Plan a tensor that is in memory."""
    return TensorPlan(name, tensor.dtype, tuple(tensor.shape), lambda: [tensor])


def no_tokenizer(_folder: Path) -> None:
    pass


def write(target: Path, plans: list[TensorPlan], **options) -> None:
    write_model_folder(target, {"model_type": "qwen3"}, plans, no_tokenizer, {}, **options)


def write_all(target: Path, **options) -> None:
    write(target, [plan_of(name, tensor) for name, tensor in TENSORS.items()], **options)


def assert_equal_bits(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == expected.dtype and torch.equal(found, expected)


@pytest.mark.parametrize("limit", [2 << 30, 64, 1], ids=["one", "some", "each"])
def test_safetensors_reads_every_type_and_shape(tmp_path, limit):
    write_all(tmp_path / "m", max_shard_bytes=limit)
    files = sorted((tmp_path / "m").glob("*.safetensors"))
    found = {}
    for file in files:
        found |= load_file(file)
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert_equal_bits(found[name], tensor)


def test_tensors_lie_at_multiples_of_their_types(tmp_path):
    write_all(tmp_path / "m")
    file = SafetensorsFile(tmp_path / "m/model.safetensors")
    for name, entry in file.entries.items():
        assert entry.start % entry.dtype.itemsize == 0, name
    file.close()


def test_shards_and_index_are_those_of_transformers(tmp_path):
    config = Qwen3MoeConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
    )
    theirs = Qwen3MoeForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    tensors = {}
    for file in (tmp_path / "theirs").glob("*.safetensors"):
        tensors |= load_file(file)
    values = json.loads((tmp_path / "theirs/config.json").read_text())
    plans = [plan_of(name, tensor) for name, tensor in tensors.items()]
    write_model_folder(tmp_path / "ours", values, plans, no_tokenizer, {}, max_shard_bytes=20_000)
    index, their_index = (
        json.loads((tmp_path / folder / "model.safetensors.index.json").read_text())
        for folder in ("ours", "theirs")
    )
    assert index["metadata"]["total_size"] == their_index["metadata"]["total_size"]
    assert index["weight_map"].keys() == their_index["weight_map"].keys()
    count = len(set(index["weight_map"].values()))
    assert count > 3
    files = {f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)}
    assert {path.name for path in (tmp_path / "ours").iterdir()} == files | {
        "config.json",
        "model.safetensors.index.json",
    }
    assert all((tmp_path / "ours" / file).stat().st_size < 24_000 for file in files)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_model(again, theirs, torch.arange(12)[None])


def test_a_single_large_tensor_has_a_shard_of_its_own(tmp_path):
    plans = [plan_of(f"t{i}", torch.full((size,), i)) for i, size in enumerate((1, 100, 1, 1))]
    write(tmp_path / "m", plans, max_shard_bytes=80)
    index = json.loads((tmp_path / "m/model.safetensors.index.json").read_text())
    assert [index["weight_map"][f"t{i}"][6:11] for i in range(4)] == [
        "00001",
        "00002",
        "00003",
        "00003",
    ]


def test_the_same_plans_give_the_same_bytes_under_the_umask(tmp_path):
    mask = os.umask(0o027)
    try:
        for name in ("a", "b"):
            write_all(tmp_path / name, max_shard_bytes=64)
    finally:
        os.umask(mask)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
        assert path.stat().st_mode & 0o777 == 0o640


def test_tensors_are_streamed_one_piece_in_memory(tmp_path):
    alive = []

    def pieces(index):
        for piece in range(4):
            assert not any(ref() is not None for ref in alive), "a piece is kept"
            tensor = torch.full((2, 3), float(10 * index + piece))
            alive.append(weakref.ref(tensor))
            yield tensor
            del tensor

    plans = [TensorPlan(f"t{i}", torch.float32, (8, 3), lambda i=i: pieces(i)) for i in range(3)]
    write(tmp_path / "m", plans)
    found = load_file(tmp_path / "m/model.safetensors")
    assert found["t2"][:, 0].tolist() == [20, 20, 21, 21, 22, 22, 23, 23]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([torch.zeros(2, 3)], "12 bytes short"),
        ([torch.zeros(2, 3), torch.zeros(2, 3)], "-12 bytes short"),
        ([torch.zeros(3, 3, dtype=torch.int32)], "part of type torch.int32"),
        ([torch.zeros(3, 2)], "has part"),
    ],
    ids=["few", "many", "type", "shape"],
)
def test_parts_that_do_not_add_up_are_our_bug(tmp_path, parts, message):
    plan = TensorPlan("t", torch.float32, (3, 3), lambda: parts)
    with pytest.raises(AssertionError, match=message):
        write(tmp_path / "m", [plan])
    assert list(tmp_path.iterdir()) == []


def test_rows_may_come_alone_and_in_any_layout(tmp_path):
    matrix = torch.arange(12.0).view(3, 4)
    rows = TensorPlan("rows", torch.float32, (3, 4), lambda: matrix)
    turned = TensorPlan("turned", torch.float32, (4, 3), lambda: [matrix.t()])
    write(tmp_path / "m", [rows, turned])
    found = load_file(tmp_path / "m/model.safetensors")
    assert torch.equal(found["rows"], matrix) and torch.equal(found["turned"], matrix.t())


@contextmanager
def largest_file(num_bytes):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_gets_one_sentence_and_leaves_nothing(tmp_path):
    plans = [plan_of(f"t{i}", torch.zeros(1000)) for i in range(4)]
    with largest_file(6000), pytest.raises(ModelFileError) as caught:
        write(tmp_path / "m", plans)
    assert str(caught.value) == (
        f"{tmp_path}/m could not be written (File too large); free space or choose another folder."
    )
    assert list(tmp_path.iterdir()) == []


def test_an_error_among_the_parts_leaves_nothing(tmp_path):
    def broken():
        yield torch.zeros(1, 3)
        raise KeyboardInterrupt

    plans = [plan_of("t", torch.zeros(2)), TensorPlan("u", torch.float32, (2, 3), broken)]
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "m", plans)
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_already_is_not_touched(tmp_path):
    (tmp_path / "m").mkdir()
    with pytest.raises(ModelFileError, match="exists already"):
        write_all(tmp_path / "m")
    assert list((tmp_path / "m").iterdir()) == []


SLOW_WRITER = """
import sys, time
from pathlib import Path
import torch
from moeyard.moe.folders.writer import TensorPlan, write_model_folder

def parts(index):
    if index == 5:
        print("half way", flush=True)
        time.sleep(600)
    return [torch.zeros(1000)]

plans = [TensorPlan(f"t{i}", torch.float32, (1000,), lambda i=i: parts(i)) for i in range(10)]
write_model_folder(Path(sys.argv[1]), {"a": 1}, plans, lambda folder: None, {}, 8000)
"""


def test_kill_9_in_mid_export_leaves_no_folder_and_the_next_attempt_works(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_WRITER, str(tmp_path / "m")],
        stdout=subprocess.PIPE,
        env=environment(),
    )
    assert process.stdout.readline() == b"half way\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert [path.name for path in tmp_path.iterdir()] == [".m.tmp"]
    assert len(list((tmp_path / ".m.tmp").glob("*.safetensors"))) == 3
    write_all(tmp_path / "m")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    names = {path.name for path in (tmp_path / "m").iterdir()}
    assert names == {"config.json", "model.safetensors"}
