"""Which images a super-resolution model trains on, and when they are read again."""

import os
import time

import numpy as np
import pytest

from moeyard.errors import DataError
from moeyard.parallel.mesh import Mesh
from moeyard.training.data.super_resolution import build_image_data
from moeyard.training.read_config import complete_run_config

import pictures


def build(folder, source, **paths):
    data = {"format": "super_resolution", "source": str(source), "eval_fraction": 0.25}
    data |= {key: str(path) for key, path in paths.items()}
    values = {"run_dir": "unset", "model": pictures.MODEL, "data": data, "train": {"steps": 1}}
    return build_image_data(complete_run_config(values), folder / "data", Mesh())


def test_copies_of_held_out_images_are_not_trained_on(tmp_path):
    images = pictures.images(12)
    images[[0, 7]] = images[2]  # every fourth is held out: 2, 6 and 10
    found = build(tmp_path, pictures.write(tmp_path / "x.npz", images))
    assert (len(found.train), len(found.held_out)) == (7, 3)
    other = pictures.write(tmp_path / "other.npz", pictures.images(12)[:4])
    found = build(tmp_path, tmp_path / "x.npz", eval_source=other)
    assert (len(found.train), len(found.held_out)) == (7, 4)
    small = pictures.write(tmp_path / "small.npz", pictures.images(2, 7))
    with pytest.raises(DataError, match=r"data.eval_source has images of 7 x 7 pixels, but model"):
        build(tmp_path, tmp_path / "x.npz", eval_source=small)


def test_images_that_change_within_a_timestamp_are_read_again(tmp_path):
    source, now = tmp_path / "x.npz", time.time()
    found = []
    for seed in (1, 2):
        np.savez(source, images=pictures.images(12, seed=seed))
        os.utime(source, (now, now))
        found.append(build(tmp_path, source).identity)
    assert found[0] != found[1]
    os.utime(source, (1e9, 1e9))
    again = build(tmp_path, source)
    source.write_bytes(b"." * source.stat().st_size)
    os.utime(source, (1e9, 1e9))
    assert build(tmp_path, source).identity == again.identity == found[1]
