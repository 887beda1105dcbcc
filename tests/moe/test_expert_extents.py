"""Experts on disk: one extent each, read by page or through the cache, compared with their hash."""

import json
import mmap
import os
import shutil
import threading
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from moeyard.errors import ModelFileError
from moeyard.moe.config.model import ModelConfig
from moeyard.moe.config.moe import MoEConfig
from moeyard.moe.folders import extents
from moeyard.moe.folders.convert import convert
from moeyard.moe.folders.expert_hashes import FILE
from moeyard.moe.folders.extents import CHUNK_BYTES, Place, chunks_of
from moeyard.moe.folders.file_reader import FileReader, buffer_of
from moeyard.moe.folders.folder import ModelFolder
from moeyard.moe.folders.safetensors_file import TensorEntry
from moeyard.moe.folders.shards import TensorPlan, fill_shards
from moeyard.moe.routers.topk import TopK
from moeyard.serving.loading import load

from hf_families import save
from small_model import CONFIG, write_random_model

WIDE = ModelConfig(
    vocab_size=257,
    d_model=64,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=32,
    max_positions=64,
    moe=MoEConfig(num_experts=4, d_expert=64, router=TopK(k=2)),
)
"""Matrices of whole pages, in every type."""


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wide") / "m"
    write_random_model(folder, WIDE)
    return folder


@pytest.fixture(scope="module")
def ragged(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ragged") / "m"
    write_random_model(folder, CONFIG)
    return folder


def views_of(config: ModelConfig, dtype=torch.float32) -> dict[str, torch.Tensor]:
    wide = (config.moe.d_expert, config.d_model)
    shapes = {"gate": wide, "up": wide, "down": wide[::-1]}
    return {part: torch.empty(shape, dtype=dtype) for part, shape in shapes.items()}


def experts_of(folder: ModelFolder) -> list[tuple[int, int]]:
    experts = range(folder.config.moe.num_experts)
    return [(layer, expert) for layer in folder.config.moe_layers for expert in experts]


def flip_bit(folder: Path, layer: int, expert: int) -> None:
    """Change a bit of an expert on disk."""
    opened = ModelFolder(folder)
    chunk = opened.expert_chunks(layer, expert)[0]
    opened.close()
    with chunk.file.path.open("r+b") as file:
        file.seek(chunk.start + 70)
        byte = file.read(1)[0]
        file.seek(chunk.start + 70)
        file.write(bytes([byte ^ 4]))


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8", "int4"])
def test_an_expert_of_a_converted_folder_is_one_extent(wide, tmp_path, dtype):
    convert(wide, tmp_path / "m", dtype)
    folder = ModelFolder(tmp_path / "m")
    chunks = [folder.expert_chunks(*key) for key in experts_of(folder)]
    assert all(len(of_one) == 1 for of_one in chunks)
    starts = [chunk.start for (chunk,) in chunks]
    assert starts[0] % 4096 == 0
    assert starts[1:] == [chunk.end for (chunk,) in chunks[:-1]], "they are neighbours, too"
    if dtype in ("fp32", "bf16"):  # scales of a model this small are no whole pages
        assert all(start % 4096 == 0 for start in starts)
    folder.close()


def test_shards_split_no_expert(wide, tmp_path):
    sizes = [10, 3, 10, 3, 10, 3]
    plans = [
        TensorPlan(f"{e}.{n}", torch.uint8, (size,), list, 0, e)
        for n, size in enumerate(sizes)
        for e in range(4)
    ]
    shards = fill_shards([TensorPlan("x", torch.float32, (2,), list), *plans], 50)
    experts = [{plan.expert for plan in shard} - {None} for shard in shards]
    assert experts == [{0}, {1}, {2}, {3}]
    assert all(len([p for p in shard if p.expert is not None]) == 6 for shard in shards)


@given(st.lists(st.tuples(st.sampled_from([1, 2, 4, 8]), st.integers(0, 9), st.booleans())))
@settings(max_examples=60, deadline=None)
def test_every_tensor_starts_at_a_multiple_of_its_type(tensors):
    types = {1: torch.uint8, 2: torch.bfloat16, 4: torch.float32, 8: torch.int64}
    plans = [
        TensorPlan(str(n), types[size], (count,), list, *((0, n // 3) if is_expert else ()))
        for n, (size, count, is_expert) in enumerate(tensors)
    ]
    for shard in fill_shards(plans, 64):
        start = 0
        for plan in shard:
            assert start % plan.dtype.itemsize == 0
            start += plan.num_bytes


@given(st.lists(st.tuples(st.integers(0, 3 * CHUNK_BYTES), st.booleans()), min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_chunks_cover_the_bytes_of_all_places_once(spans):
    file, start, places = object(), 999, []
    for size, is_next in spans:
        start += 0 if is_next else 4096 + 7
        places.append(Place(file, TensorEntry(torch.uint8, (size + 1,), start, size + 1)))
        start += size + 1
    chunks = chunks_of(places)
    assert sum(chunk.end - chunk.start for chunk in chunks) == sum(
        p.entry.num_bytes for p in places
    )
    covered = [(chunk.start, chunk.end) for chunk in chunks]
    for place in places:
        inside = [(s, e) for s, e in covered if s < place.entry.end and e > place.entry.start]
        assert inside[0][0] <= place.entry.start and inside[-1][1] >= place.entry.end
        assert all(a[1] == b[0] for a, b in pairwise(inside))
    assert all(0 < end - start <= CHUNK_BYTES for start, end in covered)
    assert all(s % 4096 == 0 for s, _ in covered if s not in {p.entry.start for p in places})


@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
def test_any_bytes_are_read_into_any_memory(tmp_path, direct):
    data, path = os.urandom(30_000), tmp_path / "file"
    path.write_bytes(data)
    descriptor = os.open(path, os.O_RDONLY)
    reader = FileReader(path, descriptor)
    if direct and not reader.open_direct():
        pytest.skip("this file system has no direct I/O")
    for start, sizes in ((0, [4096]), (4096, [8192, 512]), (5, [100, 7]), (29_999, [1]), (1, [9])):
        memory = torch.zeros(sum(sizes) + 4096, dtype=torch.uint8)
        skip = -memory.data_ptr() % 4096
        parts = list(memory[skip : skip + sum(sizes)].split(sizes))
        reader.read([buffer_of(part) for part in parts], start, direct)
        assert bytes(torch.cat(parts).tolist()) == data[start : start + sum(sizes)]
    with pytest.raises(OSError, match="ends 4 bytes too early"):
        reader.read([buffer_of(torch.zeros(10, dtype=torch.uint8))], 29_994, direct)
    reader.close()
    os.close(descriptor)


def test_direct_reads_take_new_memory_only_for_more_at_once(tmp_path, monkeypatch):
    path, made, real = tmp_path / "file", [], mmap.mmap

    def counted(descriptor, num_bytes):
        made.append(num_bytes)
        return real(descriptor, num_bytes)

    path.write_bytes(bytes(30_000))
    descriptor = os.open(path, os.O_RDONLY)
    reader = FileReader(path, descriptor)
    if not reader.open_direct():
        pytest.skip("this file system has no direct I/O")
    monkeypatch.setattr(mmap, "mmap", counted)
    for size in (9000, 7, 9000, 20_000, 20_000):
        buffers = [buffer_of(torch.empty(size, dtype=torch.uint8))]
        thread = threading.Thread(target=reader.read, args=(buffers, 5, True))
        thread.start()
        thread.join()
    assert made == [12_288, 20_480]
    reader.close()
    os.close(descriptor)


@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
def test_reads_that_stop_anywhere_go_on(wide, ragged, monkeypatch, direct):
    real = os.preadv

    def short(descriptor, buffers, offset):
        return real(descriptor, [buffers[0][:97]], offset)

    for path in (wide, ragged):
        folder = ModelFolder(path)
        expected, found = views_of(folder.config), views_of(folder.config)
        folder.read_expert(*experts_of(folder)[-1], expected)
        folder.is_direct = direct and folder.files.open_direct()
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", short)
            folder.read_expert(*experts_of(folder)[-1], found)
        assert all(torch.equal(found[part], expected[part]) for part in expected)
        folder.close()


def test_an_expert_is_read_in_chunks_that_may_fail_and_be_read_again(ragged, monkeypatch):
    monkeypatch.setattr(extents, "CHUNK_BYTES", 4096)
    folder, real, calls = ModelFolder(ragged), os.preadv, []
    expected, found = views_of(CONFIG), views_of(CONFIG)
    folder.read_expert(0, 1, expected)

    def fails_every_second_time(descriptor, buffers, offset):
        calls.append(offset)
        if len(calls) % 2:
            raise OSError(5, "Input/output error")
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", fails_every_second_time)
    steps = folder.expert_reads(0, 1, found)
    assert len(steps) == 2  # 5760 bytes that begin in the middle of a page
    for step in steps:
        with pytest.raises(OSError, match="Input/output"):
            step()
        step()
    assert all(torch.equal(found[part], expected[part]) for part in expected)
    folder.close()


def test_hashes_are_those_of_the_stored_bytes(ragged):
    tensors = load_file(ragged / "model.safetensors")
    values = json.loads((ragged / FILE).read_text())
    assert values["algorithm"] == "xxh3_64" and values["layers"].keys() == {"0", "2"}
    for layer, row in values["layers"].items():
        assert len(row) == 6
        for expert, found in enumerate(row):
            parts = ("gate_proj", "up_proj", "down_proj")
            name = f"model.layers.{layer}.mlp.experts.{expert}"
            data = b"".join(tensors[f"{name}.{part}.weight"].numpy().tobytes() for part in parts)
            assert found == xxhash.xxh3_64_hexdigest(data)


def test_hashes_of_tensors_of_many_experts_are_right(tmp_path):
    save("gpt_oss", tmp_path / "theirs", hidden_size=64, intermediate_size=96)
    convert(tmp_path / "theirs", tmp_path / "m", "bf16")
    values = json.loads((tmp_path / "m" / FILE).read_text())
    tensors = load_file(tmp_path / "m/model.safetensors")
    for layer, row in values["layers"].items():
        for expert, found in enumerate(row):
            name = f"model.layers.{layer}.mlp.experts"
            parts = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
            stored = (tensors[f"{name}.{part}"][expert].contiguous() for part in parts)
            data = b"".join(tensor.view(torch.uint8).numpy().tobytes() for tensor in stored)
            assert found == xxhash.xxh3_64_hexdigest(data)
    load(tmp_path / "m")


def test_a_flipped_bit_is_named_by_whoever_reads_the_folder(ragged, tmp_path):
    shutil.copytree(ragged, tmp_path / "m")
    flip_bit(tmp_path / "m", 2, 3)
    message = f"expert 3 of layer 2 has other bytes in model.safetensors than {FILE} says; copy"
    folder = ModelFolder(tmp_path / "m")
    folder.read_expert(2, 4, views_of(CONFIG))
    with pytest.raises(ModelFileError, match=message):
        folder.read_expert(2, 3, views_of(CONFIG))
    folder.close()
    with pytest.raises(ModelFileError, match=message):
        load(tmp_path / "m")
    with pytest.raises(ModelFileError, match=message):
        convert(tmp_path / "m", tmp_path / "n", "bf16")
    assert not (tmp_path / "n").exists()
    (tmp_path / "m" / FILE).unlink()
    load(tmp_path / "m")


def test_bytes_that_were_wrong_for_a_moment_are_read_again(ragged, monkeypatch):
    folder, real, calls = ModelFolder(ragged), os.preadv, []
    expected, found = views_of(CONFIG), views_of(CONFIG)
    folder.read_expert(0, 1, expected)

    def wrong_once(descriptor, buffers, offset):
        count = real(descriptor, buffers, offset)
        if not calls:
            buffers[0][0] ^= 1
        calls.append(offset)
        return count

    monkeypatch.setattr(os, "preadv", wrong_once)
    folder.read_expert(0, 1, found)
    assert len(calls) == 2 and all(torch.equal(found[part], expected[part]) for part in expected)
    folder.close()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "Expecting"),
        ("[]", "no object of layers"),
        ("[" * 100_000, "recursion"),
        ('{"format": "moeyard-expert-hashes", "version": 2, "layers": {}}', "version is 2"),
        (
            '{"format": "moeyard-expert-hashes", "version": 1, "algorithm": "xxh3_64", '
            '"layers": {"0": [7]}}',
            "expert 0 of layer 0 has hash 7",
        ),
    ],
)
def test_hashes_that_cannot_be_used_are_refused_with_a_sentence(ragged, tmp_path, text, reason):
    shutil.copytree(ragged, tmp_path / "m")
    (tmp_path / "m" / FILE).write_text(text)
    with pytest.raises(ModelFileError, match=f"cannot be used .*{reason}.*; copy it again"):
        ModelFolder(tmp_path / "m")
