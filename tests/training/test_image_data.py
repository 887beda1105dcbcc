"""Images with targets: array files and folders, what is held out, and data that cannot be used."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from moeyard.errors import ConfigError, DataError
from moeyard.moe.pixels import check_images, to_pixels
from moeyard.parallel.mesh import Mesh
from moeyard.training.data.image_arrays import ImageArrays
from moeyard.training.data.images import build_image_data
from moeyard.training.read_config import complete_run_config

from small_images import TASKS, VIT, arrays, write_arrays

TRAIN = {"steps": 2, "batch_sequences": 8}


def config(source, model=VIT, seed=0, **data):
    data = {"format": "images", "source": str(source), "eval_fraction": 0.2, **data}
    values = {"run_dir": "unset", "model": model, "data": data, "train": TRAIN, "seed": seed}
    return complete_run_config(values)


def build(tmp_path, source, **options):
    return build_image_data(config(source, **options), tmp_path / "data", Mesh())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    return build(folder, write_arrays(folder / "all.npz"))


def write_folder(root, count=12, **changes):
    """Write some images as files: labels by folder, maps next to images."""
    found = arrays(count)
    for number in range(count):
        folder = root / (found["side"][number] or "left")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(found["images"][number]).save(folder / f"i{number:02}.png")
        parts = np.where(found["parts"][number] < 0, 255, found["parts"][number])
        Image.fromarray(parts.astype(np.uint8)).save(folder / f"i{number:02}.parts.png")
        np.save(folder / f"i{number:02}.light.npy", found["light"][number])
    return root


def test_batches_depend_on_seed_and_step_alone(data):
    whole = data.train.of_step(3, range(8))
    halves = [data.train.of_step(3, rows) for rows in (range(5), range(5, 8))]
    for name in ("pixels_PCHW", "tasks_P"):
        both = torch.cat([getattr(half, name) for half in halves])
        assert torch.equal(both, getattr(whole, name))
    assert halves[0].draw_keys + halves[1].draw_keys == whole.draw_keys
    assert {half.scales for half in halves} == {whole.scales}
    for task in range(3):
        both = torch.cat([half.targets[task] for half in halves])
        torch.testing.assert_close(both, whole.targets[task], equal_nan=True, rtol=0, atol=0)
    assert whole.draw_keys != data.train.of_step(4, range(8)).draw_keys


def test_an_image_has_a_pass_for_each_task_with_a_target(data):
    rows = data.train.rows(range(len(data.train)))
    counts = data.train.facts.targets
    assert [len(places) for places in rows.places] == list(counts.values())
    assert counts["side"] < counts["light"] == len(data.train) and counts["parts"] < counts["light"]
    of_first = sum(key % 2**32 == 0 for key in rows.draw_keys)
    assert data.train.num_rows_of([0]) == [7 * of_first]
    for places, number in zip(rows.places, range(3), strict=True):
        assert (rows.tasks_P[places] == number).all()


def test_a_tasks_scale_makes_its_sum_the_mean_over_targets(data):
    rows = data.train.of_step(0, range(8))
    for places, scale in zip(rows.places, rows.scales, strict=True):
        assert len(places) * scale == pytest.approx(8)


def test_targets_stay_with_their_images(data):
    found = arrays()
    known = {image.tobytes(): number for number, image in enumerate(found["images"])}
    for part in (data.train, data.held_out):
        rows = part.rows(range(len(part)))
        for place, light in zip(rows.places[2].tolist(), rows.targets[2], strict=True):
            pixels = ((rows.pixels_PCHW[place, 0] + 1) * 127.5).round().to(torch.uint8)
            number = known[pixels.numpy().tobytes()]
            np.testing.assert_array_equal(light[..., 0].numpy(), found["light"][number])
            if found["side"][number]:
                index = rows.tasks_P.tolist()[:place].count(0) - 1
                assert part.labels["side"][rows.targets[0][index]] == found["side"][number]


def test_every_label_is_held_out_and_nothing_is_on_both_sides(data):
    sides = [part.rows(range(len(part))) for part in (data.train, data.held_out)]
    assert len(data.train) + len(data.held_out) == 60 and len(data.held_out) >= 10
    assert all(set(rows.targets[0].tolist()) == {0, 1} for rows in sides)
    known = [{pixels.numpy().tobytes() for pixels in rows.pixels_PCHW} for rows in sides]
    assert not known[0] & known[1]


def test_copies_of_held_out_images_are_not_trained_on(tmp_path):
    held_out = write_arrays(tmp_path / "held.npz", **{n: a[:9] for n, a in arrays().items()})
    found = build(tmp_path, write_arrays(tmp_path / "all.npz"), eval_source=str(held_out))
    assert (len(found.train), len(found.held_out)) == (51, 9)


def test_a_folder_gives_what_an_array_file_gives(tmp_path):
    root = write_folder(tmp_path / "images")
    (root / "left" / "i03.parts.png").unlink(missing_ok=True)
    (root / "right" / "i03.parts.png").unlink(missing_ok=True)
    found = build(tmp_path, root, eval_fraction=0.3)
    everything = [found.train, found.held_out]
    assert sum(part.facts.targets["light"] for part in everything) == 12
    without = sum(part.facts.targets["parts"] for part in everything)
    assert without == 12 - len({0, 7, 3})
    assert sum(part.facts.targets["side"] for part in everything) == 12
    assert found.train.labels == {"side": ["left", "right"]}
    known = {image.tobytes(): n for n, image in enumerate(arrays(12)["images"])}
    rows = found.train.rows([0])
    pixels = ((rows.pixels_PCHW[0, 0] + 1) * 127.5).round().to(torch.uint8)
    number = known[pixels.numpy().tobytes()]
    np.testing.assert_array_equal(rows.targets[2][0, ..., 0].numpy(), arrays(12)["light"][number])


def test_prepared_images_are_used_again_without_reading_the_source(tmp_path, monkeypatch):
    source = write_arrays(tmp_path / "all.npz")
    os.utime(source, (1e9, 1e9))
    first = build(tmp_path, source)
    monkeypatch.setattr(ImageArrays, "read_images", None)
    monkeypatch.setattr(np, "load", None)
    assert build(tmp_path, source).identity == first.identity


def test_prepared_images_are_used_again_and_changed_ones_are_not(tmp_path):
    source = write_arrays(tmp_path / "all.npz")
    first = build(tmp_path, source)
    assert build(tmp_path, source).identity == first.identity
    changed = arrays()
    changed["parts"][5, 0, 1] = 2
    assert build(tmp_path, write_arrays(source, **changed)).identity != first.identity


def test_deep_and_fractional_images_are_the_same_pixels():
    fractions = np.linspace(0, 1, 12, dtype=np.float32).reshape(1, 3, 4)
    deep = (fractions * 65535).round().astype(np.uint16)
    assert to_pixels(check_images(fractions, "x")).amax() == 1
    torch.testing.assert_close(
        *(to_pixels(check_images(one, "x")) for one in (fractions, deep)), rtol=0, atol=1e-4
    )


WRONG = {
    "unequal": ({"images": np.zeros((60, 8), np.uint8)}, r"shape \[60, 8\]; give \[images, height"),
    "other size": ({"images": np.zeros((60, 8, 8), np.uint8)}, "images of 8 x 8 pixels with 1"),
    "words": ({"images": np.full((60, 8, 12), "x")}, "numbers of type <U1; give uint8"),
    "too bright": ({"images": np.full((60, 8, 12), 3.0)}, "floats from 3 to 3; scale them to 0 to"),
    "no task": ({"light": None}, "has nothing for the task 'light'; add an array of this name"),
    "no images": ({"images": None}, "has no array 'images', only"),
    "too few": ({"light": np.zeros((9, 8, 12))}, "60 images, but the array 'light' has shape"),
    "no target": ({"light": np.full((60, 8, 12), np.nan)}, "no target for the task 'light'; give"),
    "infinite": ({"light": np.full((60, 8, 12), np.inf)}, "infinite numbers for the task 'light'"),
    "class": ({"parts": np.full((60, 8, 12), 3)}, "class 3 for the task 'parts', which has 3 clas"),
    "fraction": ({"parts": np.full((60, 8, 12), 0.5)}, "float64 for the task 'parts'; give the nu"),
    "map size": ({"parts": np.zeros((60, 8, 8), int)}, "map of 8 x 8 for the task 'parts', where"),
    "label": ({"side": np.full(60, -7)}, "label -7 for the task 'side'; give numbers from 0"),
    "labels": ({"side": np.full(60, 0.5)}, "labels of type float64 and shape .60.* for the task"),
    "one label": ({"side": np.full(60, "left")}, "have 1 labels for the task 'side'; give images"),
    "objects": ({"side": np.array([None] * 60)}, "cannot be read as an .npz file"),
}


@pytest.mark.parametrize("name", WRONG)
def test_arrays_that_cannot_be_used_are_one_sentence(name, tmp_path):
    changes, sentence = WRONG[name]
    with pytest.raises((ConfigError, DataError), match=sentence):
        build(tmp_path, write_arrays(tmp_path / "all.npz", **changes))


def test_folders_that_cannot_be_used_are_one_sentence(tmp_path):
    def refused(sentence, **options):
        with pytest.raises(DataError, match=sentence):
            build(tmp_path, root, **options)

    root = tmp_path / "none"
    refused("none', which is not there; give another path")
    root.write_text("no images")
    refused("neither a folder nor an .npz file")
    root.unlink()
    root.mkdir()
    refused("a folder without images; give one with .png")
    root = write_folder(tmp_path / "images")
    two = {**VIT, "tasks": [TASKS[0], {**TASKS[0], "name": "again"}, TASKS[2]]}
    refused("2 tasks want labels of images, 'side' among them, but folders give one", model=two)
    lonely = root / "left" / "gone.light.npy"
    np.save(lonely, np.zeros((8, 12)))
    refused("gone.light.npy is a map, but gone.png is not there")
    lonely.unlink()
    Image.fromarray(np.zeros((9, 12), np.uint8)).save(root / "left" / "z.png")
    refused("z.png has 9 x 12 pixels of uint8, but .*i00.png has 8 x 12")
    (root / "left" / "z.png").unlink()
    path = min((root / "left").glob("*.light.npy"))
    path.rename(path.with_suffix(".NPY")).write_bytes(b"")
    refused("light.NPY cannot be read as an array .*; write it again with numpy.save")
    path.with_suffix(".NPY").unlink()
    (root / "left" / "z.png").write_text("no image")
    refused("z.png cannot be read as an image")


def test_a_label_that_is_on_held_out_images_alone_is_refused(tmp_path):
    other = arrays()
    other["side"] = np.array([*other["side"][:-1], "middle"])
    held_out = write_arrays(tmp_path / "held.npz", **other)
    with pytest.raises(DataError, match="the label 'middle' of the task 'side' is on held-out"):
        build(
            tmp_path,
            write_arrays(tmp_path / "all.npz", images=arrays(60, 5)["images"]),
            eval_source=str(held_out),
        )
