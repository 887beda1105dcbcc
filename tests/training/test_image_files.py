"""Files of images and of arrays: depths, sizes, suffixes, and files that cannot be read."""

import zipfile

import numpy as np
import pytest
from PIL import Image

from moeyard.errors import DataError
from moeyard.moe.arrays import ArrayFile, read_array
from moeyard.training.data.image_files import (
    read_bytes,
    read_image,
    read_images,
    read_numbers,
    write_images,
)

DEEP = np.array([[0, 100, 300, 30000, 65535]], np.uint16)


def test_greys_of_16_bits_are_not_cut_off(tmp_path):
    for name in ("deep.png", "deep.tif"):
        path = tmp_path / name
        Image.fromarray(DEEP).save(path)
        assert np.array_equal(read_numbers(path, None), DEEP)
        assert np.array_equal(read_image(path, 1)[..., 0], DEEP)
        assert read_bytes(path, 1)[..., 0].tolist() == [[0, 0, 1, 117, 255]]
        for channels in (3, 4):
            image = read_image(path, channels)
            assert all(np.array_equal(image[..., place], DEEP) for place in range(3))
            assert channels == 3 or (image[..., 3] == 65535).all()
    assert read_images(str(tmp_path), "x", "images", 1)[1, 0, :, 0].tolist() == [0, 0, 1, 117, 255]


def test_images_of_the_other_byte_order_are_the_same(tmp_path):
    path = tmp_path / "big.tif"
    Image.frombytes("I;16B", (5, 1), DEEP.astype(">u2").tobytes()).save(path)
    image = read_image(path, 1)
    assert image.dtype == np.uint16 and np.array_equal(image[..., 0], DEEP)


def test_images_that_cannot_be_converted_are_refused(tmp_path):
    Image.fromarray(np.full((2, 2), 0.5, np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(DataError, match=r"float.tif cannot .*32 bits for a pixel.*; give another"):
        read_image(tmp_path / "float.tif", 1)
    assert read_numbers(tmp_path / "float.tif", None).tolist() == [[0.5, 0.5], [0.5, 0.5]]


def test_huge_images_are_refused_in_one_sentence(tmp_path, monkeypatch):
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    for read in (read_image, read_bytes):
        with pytest.raises(DataError, match=r"huge.png cannot be read as an image \(Image size"):
            read(tmp_path / "huge.png", 1)


def test_suffixes_may_be_in_capitals(tmp_path):
    images = np.arange(24, dtype=np.uint8).reshape(2, 3, 4, 1)
    write_images(tmp_path / "all.NPZ", images, "images")
    assert np.array_equal(read_images(str(tmp_path / "all.NPZ"), "x", "images", 1), images)


def write_broken(folder):
    """Write files that are not array files, each in another way; return their paths."""
    np.save(folder / "one.npy", np.zeros(3))
    (folder / "one.npy").rename(folder / "one.npz")
    (folder / "empty.npz").touch()
    np.savez_compressed(folder / "flipped.npz", images=np.arange(999))
    data = bytearray((folder / "flipped.npz").read_bytes())
    data[300:600] = bytes(byte ^ 255 for byte in data[300:600])
    (folder / "flipped.npz").write_bytes(data)
    with zipfile.ZipFile(folder / "hollow.npz", "w") as archive:
        archive.writestr("images.npy", b"")
    return sorted(folder.iterdir())


def test_broken_array_files_are_refused_in_one_sentence(tmp_path):
    paths = write_broken(tmp_path)
    assert len(paths) == 4
    for path in paths:
        with pytest.raises(DataError, match=r"data.source is .*npz', which cannot be read as an"):
            ArrayFile(path, "data.source").read("images")
        with pytest.raises(DataError, match=r"which cannot be read .*; write it again with numpy"):
            read_images(str(path), "data.source", "images", 1)


def test_opening_an_array_file_reads_no_array(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "x.npz", images=np.zeros((3, 4)), words=np.array(["a", "bc"]))
    with monkeypatch.context() as patch:
        patch.setattr(np, "load", None)
        patch.setattr(np.lib.format, "read_array", None)
        file = ArrayFile(tmp_path / "x.npz", "data.source")
    assert file.shapes == {"images": (3, 4), "words": (2,)}
    assert file.read("words").tolist() == ["a", "bc"]


def test_an_array_alone_is_read_or_refused(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(3))
    assert read_array(tmp_path / "x.npy").tolist() == [0, 1, 2]
    (tmp_path / "empty.npy").touch()
    with pytest.raises(DataError, match=r"empty.npy cannot be read as an array .*; write it again"):
        read_array(tmp_path / "empty.npy")
