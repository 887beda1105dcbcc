"""How a store reads: chosen by measuring, checked at every read, ordinary folders included."""

import itertools
import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from test_confinement import choices_of, engine_of, short_ones

from moeyard.errors import ConfigError, ExpertReadError, ModelFileError
from moeyard.moe.folders.expert_hashes import FILE
from moeyard.moe.folders.extents import Chunk
from moeyard.moe.folders.folder import ModelFolder
from moeyard.serving.experts.options import StoreOptions
from moeyard.serving.experts.reading import choose, probe
from moeyard.serving.experts.reading.choose import plan_reads
from moeyard.serving.experts.reading.plan import ReadPlan
from moeyard.serving.experts.reading.probe import Probe, Way
from moeyard.serving.loading import load, open_model

from small_model import NUM_EXPERTS, SLOT_ELEMENTS, slots, small_store, visit
from test_engine import run

SECONDS = 0.005
EXPERT_BYTES = SLOT_ELEMENTS * 4


@pytest.fixture
def ordinary(model_folder, tmp_path, monkeypatch) -> Path:
    """A folder without hashes, and a cache folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(model_folder, tmp_path / "m")
    (tmp_path / "m" / FILE).unlink()
    return tmp_path / "m"


def flip_bit(folder: Path, layer: int, expert: int) -> None:
    """Change a bit of an expert on disk, and no time of change."""
    opened = ModelFolder(folder)
    chunk = opened.expert_chunks(layer, expert)[-1]
    opened.close()
    status = chunk.file.path.stat()
    with chunk.file.path.open("r+b") as file:
        file.seek(chunk.end - 1)
        byte = file.read(1)[0]
        file.seek(chunk.end - 1)
        file.write(bytes([byte ^ 1]))
    os.utime(chunk.file.path, ns=(status.st_atime_ns, status.st_mtime_ns))


def sidecars(folder: Path) -> list[Path]:
    return list((folder.parent / "cache/moeyard/expert-hashes").iterdir())


def quick(monkeypatch) -> None:
    monkeypatch.setattr(choose, "SMALL_BYTES", 0)
    monkeypatch.setattr(probe, "COMPARE_S", SECONDS)
    monkeypatch.setattr(probe, "RATE_S", SECONDS)


@pytest.mark.usefixtures("reading_path")
@pytest.mark.parametrize("reader", ["buffered", "direct", "auto"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_reader_gives_the_logits_of_the_model_in_memory(
    model_folder, monkeypatch, reader, dtype
):
    quick(monkeypatch)
    ids = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(3))
    expected = load(model_folder, dtype)(ids)
    found = load(model_folder, dtype, expert_memory=slots(3, dtype), expert_reader=reader)(ids)
    assert torch.equal(found, expected)


@pytest.mark.usefixtures("reading_path")
def test_a_flipped_bit_ends_the_requests_that_chose_the_expert_and_no_others(
    model_folder, tmp_path
):
    shutil.copytree(model_folder, tmp_path / "m")
    resident, _ = open_model(tmp_path / "m")
    expected, chosen = {}, choices_of(resident)
    for one in short_ones():
        expected |= run(engine_of(resident), [one])[0]
    users = {key: {name for name in chosen if key in chosen[name]} for key in chosen["4"]}
    key = min(users, key=lambda key: abs(len(users[key]) - 3))
    assert 0 < len(users[key]) < len(chosen), "the expert must matter to some requests, not to all"

    flip_bit(tmp_path / "m", *key)
    model, store = open_model(tmp_path / "m", expert_memory="25%")
    texts, reasons, errors = run(engine_of(model, store), short_ones())
    assert {name for name, reason in reasons.items() if reason == "error"} == users[key]
    for name, text in expected.items():
        if name in users[key]:
            sentence = f"expert {key[1]} of layer {key[0]} has other bytes in model.safetensors"
            assert text.startswith(texts[name]) and sentence in str(errors[name])
            assert "try again" not in str(errors[name])
        else:
            assert texts[name] == text
    store.close()


@pytest.mark.usefixtures("reading_path")
def test_an_ordinary_folder_is_compared_with_its_first_read(ordinary):
    store = small_store(ordinary, 2)
    visit(store, 0, 0, 1, 2)
    flip_bit(ordinary, 0, 0)  # an expert that has left memory
    flip_bit(ordinary, 2, 5)  # one that was never read
    visit(store, 0, 1)
    with pytest.raises(ExpertReadError, match=r"other bytes in .* than at its first read; copy"):
        visit(store, 0, 0)
    visit(store, 2, 5)
    store.close()
    (sidecar,) = sidecars(ordinary)
    rows = json.loads(sidecar.read_text())["layers"]
    assert {layer: sum(h is not None for h in row) for layer, row in rows.items()} == {
        "0": 3,
        "2": 1,
    }
    again = small_store(ordinary, 2)
    with pytest.raises(ExpertReadError, match=f"or delete {sidecar.name} in the cache folder"):
        visit(again, 0, 0)
    again.close()


@pytest.mark.usefixtures("reading_path")
def test_processes_that_serve_one_folder_add_to_each_others_hashes(ordinary):
    first, second = small_store(ordinary, 2), small_store(ordinary, 2)
    visit(first, 0, 0, 1)
    visit(second, 0, 1, 2)
    first.close()
    second.close()
    (sidecar,) = sidecars(ordinary)
    assert all(json.loads(sidecar.read_text())["layers"]["0"])


def test_other_weights_begin_anew(ordinary):
    store = small_store(ordinary, 2)
    visit(store, 0, 0)
    store.close()
    flip_bit(ordinary, 0, 0)
    weights = ordinary / "model.safetensors"
    os.utime(weights, ns=(1, 1))
    store = small_store(ordinary, 2)
    visit(store, 0, 0)
    store.close()


@pytest.mark.parametrize("text", ["", "{}", '{"format": 3, "layers": {}}', "\x00\xff"])
def test_a_damaged_file_of_hashes_is_a_warning_and_written_anew(ordinary, caplog, text):
    store = small_store(ordinary, 2)
    visit(store, 0, 0)
    store.close()
    (sidecar,) = sidecars(ordinary)
    sidecar.write_text(text)
    store = small_store(ordinary, 2)
    assert "is damaged" in caplog.text
    visit(store, 0, 1)
    store.close()
    assert json.loads(sidecar.read_text())["layers"]["0"][1]


def test_a_cache_folder_that_cannot_be_written_is_a_warning(ordinary, caplog, tmp_path):
    (tmp_path / "cache").write_text("a file")
    store = small_store(ordinary, 2)
    visit(store, 0, 0)
    store.close()
    assert "Hashes of experts cannot be kept" in caplog.text


def test_folders_with_hashes_leave_the_cache_folder_alone(model_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    store = small_store(model_folder, 2)
    visit(store, 0, 0)
    store.close()
    assert not (tmp_path / "cache").exists()


def test_a_probe_reads_at_most_what_it_may(model_folder, monkeypatch):
    quick(monkeypatch)
    monkeypatch.setattr(probe, "MAX_BYTES", 1 << 20)
    monkeypatch.setattr(probe, "COMPARE_S", 60)
    monkeypatch.setattr(probe, "RATE_S", 60)
    real, lock, read = os.preadv, threading.Lock(), [0]

    def counted(*arguments):
        count = real(*arguments)
        with lock:
            read[0] += count
        return count

    folder = ModelFolder(model_folder)
    monkeypatch.setattr(os, "preadv", counted)
    plan = plan_reads(folder, "auto", free_bytes=0)
    assert 0 < read[0] < 2 << 20
    assert plan.threads in (1, 2, 4, 8) and plan.bytes_per_s > 0
    folder.close()


@pytest.mark.parametrize(
    ("share", "buffered", "direct", "mode"),
    [
        (0.0, 1e9, 2e9, "direct"),
        (0.0, 2e9, 1e9, "buffered"),
        (0.4, 1e9, 2e9, "direct"),
        (0.6, 1e9, 2e9, "buffered"),
        (1.0, 1e9, 9e9, "buffered"),
    ],
)
def test_the_page_cache_wins_as_far_as_it_can_hold_experts(
    model_folder, monkeypatch, share, buffered, direct, mode
):
    monkeypatch.setattr(choose, "SMALL_BYTES", 0)
    rates = {"buffered": buffered, "direct": direct}

    class Measured:
        def __init__(self, chunks, is_cold):
            assert is_cold == (share < 1)

        def compare(self, modes):
            assert share < 1 or tuple(modes) == ("buffered",)
            return [Way(mode, 2, rates[mode]) for mode in modes]

        def rate(self, way):
            return way.bytes_per_s / 2

    monkeypatch.setattr(choose, "Probe", Measured)
    folder = ModelFolder(model_folder)
    if not folder.files.open_direct():
        pytest.skip("this file system has no direct I/O")
    plan = plan_reads(folder, "auto", int(share * NUM_EXPERTS * EXPERT_BYTES))
    assert (plan.mode, plan.threads, plan.bytes_per_s) == (mode, 2, rates[mode] / 2)
    assert folder.is_direct == (mode == "direct")
    assert plan.text.startswith("Experts are read ") and plan.text.count(".") <= 5
    folder.close()


@pytest.mark.parametrize("limit", [200e6, 800e6])
def test_the_rate_of_a_device_that_a_control_group_stops_is_that_of_whole_periods(
    model_folder, monkeypatch, limit
):
    """A clock that is made up: bursts of 1.2 GB/s, then a stop, ten times a second."""
    now, step = [0.0], 1 << 20
    monkeypatch.setattr(probe.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(probe, "THREADS", (1,))
    folder = ModelFolder(model_folder)
    chunk = folder.expert_chunks(0, 0)[0]
    units = itertools.repeat(Chunk(chunk.file, 0, step))
    monkeypatch.setattr(probe, "_units", lambda chunks, is_cold: units)
    used = [limit * 0.04]  # of the first tenth of a second

    def read(buffers, start, direct):
        now[0] += step / 1.2e9
        used[0] += step
        if used[0] >= limit / 10:
            now[0] = (now[0] // 0.1 + 1) * 0.1
            used[0] -= limit / 10

    monkeypatch.setattr(chunk.file.reader, "read", read)
    measured = Probe([chunk], is_cold=True)
    (way,) = measured.compare(["direct"])
    assert way.bytes_per_s == pytest.approx(1.2e9, rel=0.1)
    assert measured.rate(way) == pytest.approx(limit, rel=0.06)
    folder.close()


def test_the_fewest_threads_win_that_are_about_as_fast():
    ways = [Way("direct", threads, rate) for threads, rate in ((4, 99), (1, 80), (2, 97), (8, 100))]
    assert probe._fewest_threads(ways).threads == 2


def test_a_plan_says_what_was_decided_in_a_line():
    plan = ReadPlan("direct", 1, 8.37e8, "expert-reader says so")
    assert plan.text == (
        "Experts are read around the page cache by 1 thread at 837 MB/s: expert-reader says so."
    )


def test_readers_that_cannot_be_are_refused(model_folder, monkeypatch):
    with pytest.raises(ConfigError, match="expert-reader is 'fast'; use one of auto, buffered"):
        small_store(model_folder, 2, options=StoreOptions(reader="fast"))
    folder = ModelFolder(model_folder)
    monkeypatch.delattr(os, "O_DIRECT")
    with pytest.raises(ConfigError, match=r"file system of .* offers no direct I/O; use auto"):
        plan_reads(folder, "direct", 0)
    assert plan_reads(folder, "auto", 0).mode == "buffered"
    folder.close()


def test_a_disk_that_fails_at_the_start_is_a_sentence(model_folder, monkeypatch):
    folder = ModelFolder(model_folder)

    def broken(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(ModelFileError, match=r"could not be read: .*Input/output error; copy"):
        plan_reads(folder, "auto", 0)
    folder.close()
