"""Reads in C++: the hash, faults of the disk, several chunks, and what Python still does."""

import ctypes
import os
import random
import shutil
import threading
from itertools import pairwise

import pytest
import torch
import xxhash
from test_expert_reading import EXPERT_BYTES

from moeyard import cpp_libraries
from moeyard.errors import ExpertReadError
from moeyard.moe.folders import extents
from moeyard.moe.folders.expert_hashes import FILE
from moeyard.moe.folders.file_reader import FileReader
from moeyard.serving.experts.options import StoreOptions
from moeyard.serving.experts.read_queue import ReadQueue
from moeyard.serving.experts.reading.native import library
from moeyard.serving.experts.reading.native.queue import NativeQueue
from moeyard.serving.loading import open_model

from reading_paths import READ_AT, Piece
from small_model import NUM_EXPERTS, slots, small_store, visit

native = library.load()
pytestmark = pytest.mark.skipif(native is None, reason="no C++ compiler")


@pytest.fixture
def python_reads(monkeypatch):
    """Return the sizes of what Python reads from now on."""
    read, sizes = FileReader.read, []

    def counted(reader, buffers, start, direct=False):
        sizes.append(sum(len(buffer.view) for buffer in buffers))
        read(reader, buffers, start, direct)

    monkeypatch.setattr(FileReader, "read", counted)
    return sizes


@pytest.fixture
def disk():
    """Return what sets the function by which C++ reads."""
    kept = []

    def use(function):
        kept.append(READ_AT(function))
        native.read_with(ctypes.cast(kept[-1], ctypes.c_void_p))

    yield use
    native.read_with(None)


def read_part(descriptor, pieces, count, offset, most):
    """Read some bytes into the first piece, like a disk that stops early."""
    piece = Piece.from_address(pieces)
    data = os.pread(descriptor, min(most, piece.length), offset)
    ctypes.memmove(piece.start, data, len(data))
    return len(data)


def hash_of(data: bytes, cuts: list[int]) -> int:
    memory = ctypes.create_string_buffer(data, len(data))
    edges = [0, *sorted(cuts), len(data)]
    start = ctypes.addressof(memory)
    pieces = (Piece * (len(edges) - 1))(*((start + a, b - a) for a, b in pairwise(edges)))
    return native.hash(ctypes.addressof(pieces), len(pieces), len(data))


def test_the_hash_is_xxh3_however_the_bytes_are_cut():
    chance = random.Random(0)
    lengths = [*range(241, 2200, 7), *range(960, 1100), 65536, 65537, 196608, 100_003]
    for length in lengths:
        data = chance.randbytes(length)
        cuts = [chance.randrange(length + 1) for _ in range(chance.randrange(4))]
        assert hash_of(data, cuts) == xxhash.xxh3_64_intdigest(data), (length, cuts)


@pytest.mark.parametrize("reader", ["buffered", "direct"])
def test_python_reads_no_expert_that_c_reads(model_folder, python_reads, reader):
    resident, _ = open_model(model_folder)
    options = StoreOptions(reader=reader)
    model, store = open_model(model_folder, expert_memory=slots(3), options=options)
    before = len(python_reads)
    ids = torch.arange(60).reshape(2, 30)
    assert torch.equal(model(ids), resident(ids))
    assert len(python_reads) == before
    assert store.rates.reads["disk"] > NUM_EXPERTS // 2
    assert store.rates.bytes["disk"] == store.rates.reads["disk"] * EXPERT_BYTES
    assert store.rates.seconds("disk") > 0
    store.close()


def test_reads_that_stop_early_go_on(model_folder, disk, python_reads):
    resident, _ = open_model(model_folder)
    model, store = open_model(model_folder, expert_memory=slots(3))
    before = len(python_reads)
    disk(lambda *arguments: read_part(*arguments, most=700))
    ids = torch.arange(60).reshape(2, 30)
    assert torch.equal(model(ids), resident(ids)) and len(python_reads) == before
    store.close()


@pytest.mark.parametrize("fault", ["error", "end", "wrong byte"])
def test_what_c_cannot_read_python_reads_from_the_beginning(
    model_folder, disk, python_reads, fault
):
    def broken(descriptor, pieces, count, offset):
        if fault == "wrong byte":
            into = (Piece * count).from_address(pieces)
            for piece in into:  # memory that is used again may hold the right bytes
                ctypes.memset(piece.start, 0xA5, piece.length)
            return sum(piece.length for piece in into)
        return 0 if fault == "end" else -1

    store = small_store(model_folder, 3)
    before = len(python_reads)
    disk(broken)
    assert visit(store, 0, 1, 2) == [1, 2]
    assert len(python_reads) == before + 2, "a read for each, without the attempt of C++"
    assert store.rates.reads["disk"] == 2
    store.close()


def test_a_file_cut_short_ends_its_own_requests(model_folder, tmp_path):
    shutil.copytree(model_folder, tmp_path / "m")
    store = small_store(tmp_path / "m", 4)
    files = store._filler._tier._disk._folder
    keys = [(layer, expert) for layer in (0, 2) for expert in range(6)]
    end_of = {key: files.expert_chunks(*key)[-1].end for key in keys}
    layer, expert = max(end_of, key=end_of.__getitem__)
    os.truncate(tmp_path / "m" / "model.safetensors", end_of[layer, expert] - 3)
    with pytest.raises(
        ExpertReadError, match=r"model\.safetensors ends 3 bytes too early"
    ) as raised:
        visit(store, layer, expert, (expert + 1) % 6)
    assert raised.value.experts == (expert,)
    assert visit(store, layer, (expert + 1) % 6) == [(expert + 1) % 6]
    store.close()


def test_the_first_read_of_an_ordinary_folder_is_python_s_and_the_next_is_not(
    model_folder, tmp_path, monkeypatch, python_reads
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(model_folder, tmp_path / "m")
    (tmp_path / "m" / FILE).unlink()
    store = small_store(tmp_path / "m", 1)
    before = len(python_reads)
    visit(store, 0, 3)
    visit(store, 0, 4)
    assert len(python_reads) == before + 2
    visit(store, 0, 3)
    assert len(python_reads) == before + 2
    store.close()


def in_two_chunks(monkeypatch, folder):
    """Return a store whose experts are read by two calls."""
    monkeypatch.setattr(extents, "CHUNK_BYTES", 4096)
    store = small_store(folder, 6, num_threads=1)
    files = store._filler._tier._disk._folder
    starts = {
        (layer, expert): [chunk.start for chunk in files.expert_chunks(layer, expert)]
        for layer in (0, 2)
        for expert in range(6)
    }
    assert all(len(found) >= 2 for found in starts.values())
    return store, starts


@pytest.mark.parametrize("end", ["laid aside", "dropped", "promoted"])
def test_between_the_chunks_of_an_early_read(model_folder, monkeypatch, disk, end):
    store, starts = in_two_chunks(monkeypatch, model_folder)
    begun, hold, order = threading.Event(), threading.Event(), []

    def slow(descriptor, pieces, count, offset):
        order.append(offset)
        begun.set()
        assert hold.wait(10)
        memory = (Piece * count).from_address(pieces)
        views = [(ctypes.c_char * p.length).from_address(p.start) for p in memory]
        return os.preadv(descriptor, [memoryview(view).cast("B") for view in views], offset)

    disk(slow)
    store.prefetch(2, [3])
    assert begun.wait(10)
    (early,) = store._slots.all_filling()
    urgent = store._filler.submit((0, 1), store._slots.take_free(0), is_urgent=True)
    if end == "dropped":
        store._filler.drop(early)
    if end == "promoted":
        assert store._reads.make_urgent(early)
    hold.set()
    store._reads.wait_for_all([early, urgent])
    first, others = starts[2, 3][0], starts[2, 3][1:]
    expected = {
        "laid aside": [first, *starts[0, 1], *others],
        "dropped": [first, *starts[0, 1]],
        "promoted": [first, *others, *starts[0, 1]],
    }
    assert order == expected[end]
    assert (early.error is not None) == (end == "dropped") and urgent.error is None
    if end == "dropped":
        assert not store._reads.make_urgent(early)
    store.close()


def test_closing_ends_reads_that_wait(model_folder, disk):
    store = small_store(model_folder, 6, num_threads=1)
    begun, hold = threading.Event(), threading.Event()

    def stuck(*arguments):
        begun.set()
        hold.wait(10)
        return -1

    disk(stuck)
    reads = [store._filler.submit((0, e), store._slots.take_free(0), True) for e in range(3)]
    assert begun.wait(10)
    closing = threading.Thread(target=store.close)
    closing.start()
    store._reads.wait_for_all(reads[1:])
    assert all("closed" in str(read.error) for read in reads[1:])
    hold.set()
    closing.join(10)
    store._reads.look()
    assert reads[0].is_done


def test_without_a_compiler_python_reads_and_a_line_says_why(
    model_folder, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(library, "_loaded", [])
    monkeypatch.setattr(cpp_libraries, "COMPILERS", ("no-such-compiler",))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for _ in range(2):
        store = small_store(model_folder, 2)
        assert isinstance(store._reads, ReadQueue) and visit(store, 0, 1) == [1]
        store.close()
    said = "experts are read by Python, not by C++: no C++ compiler"
    assert caplog.text.count(said) == 1


def test_where_there_is_a_compiler_c_reads(model_folder):
    store = small_store(model_folder, 2)
    assert isinstance(store._reads, NativeQueue)
    store.close()
