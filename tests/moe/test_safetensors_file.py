"""Parts of packed tensors are read separately, by any number of threads."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import save_file

from moeyard.errors import ModelFileError
from moeyard.moe.folders.safetensors_file import SafetensorsFile

PACKED = torch.randn(6, 5, 7, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def file(tmp_path):
    tensors = {"before": torch.ones(3), "packed": PACKED, "few": PACKED.bfloat16()}
    tensors |= {"scalar": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "m.safetensors")
    opened = SafetensorsFile(tmp_path / "m.safetensors")
    yield opened
    opened.close()


def test_a_part_is_read_and_nothing_else(file, monkeypatch):
    plain, read = os.preadv, []

    def counted(*arguments):
        read.append(plain(*arguments))
        return read[-1]

    monkeypatch.setattr(os, "preadv", counted)
    for index in (0, 3, 5):
        out = torch.empty(5, 7)
        file.read_part("packed", index, out)
        assert torch.equal(out, PACKED[index])
    assert sum(read) == 3 * 5 * 7 * 4


def test_parts_are_converted_and_may_lie_in_other_strides(file):
    out = torch.empty(5, 7)
    file.read_part("few", 2, out)
    assert torch.equal(out, PACKED[2].bfloat16().float())
    wide = torch.zeros(7, 5)
    file.read_part("packed", 4, wide.t())
    assert torch.equal(wide.t(), PACKED[4])


def test_a_part_of_another_shape_gets_one_sentence(file):
    message = r"packed has shape \[6, 5, 7\], config.json asks for \[6, 7, 5\]"
    with pytest.raises(ModelFileError, match=message):
        file.read_part("packed", 0, torch.empty(7, 5))
    with pytest.raises(ModelFileError, match=r"scalar has shape \[\], config"):
        file.read_part("scalar", 0, torch.empty(()))
    with pytest.raises(AssertionError, match="has no part 6"):
        file.read_part("packed", 6, torch.empty(5, 7))


def test_threads_read_parts_at_once(file):
    outs = [torch.empty(5, 7) for _ in range(600)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda pair: file.read_part("packed", pair[0] % 6, pair[1]), enumerate(outs)))
    for index, out in enumerate(outs):
        assert torch.equal(out, PACKED[index % 6])


def test_a_file_that_shrank_since_it_was_opened_is_an_error(file):
    os.truncate(file.path, file.path.stat().st_size - 20)
    last = max(file.entries, key=lambda name: file.entries[name].start)
    with pytest.raises(OSError, match="bytes too early"):
        file.read_into(last, torch.empty(file.entries[last].shape, dtype=file.entries[last].dtype))
