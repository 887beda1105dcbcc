"""A vision model from a folder: its answers, two experts at a time, and tasks that cost nothing."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import moeyard
from moeyard.cli import main as command
from moeyard.errors import ConfigError
from moeyard.moe.config.kinds import read_model
from moeyard.moe.folders.families.table import FAMILIES
from moeyard.moe.folders.folder import ModelFolder
from moeyard.moe.folders.hf_config import to_hf
from moeyard.moe.folders.write_weights import plan_weights
from moeyard.moe.folders.writer import write_model_folder
from moeyard.moe.models.initialize import initialize
from moeyard.moe.models.table import build_model
from moeyard.serving.experts.budget import count_slots
from moeyard.serving.loading import open_kind
from moeyard.serving.planning import outlook

from small_images import TASKS, VIT, arrays
from small_model import DecoderWeights

NUM_EXPERTS, MOE_LAYERS = 6, (1, 3)
TASK_NAMES = ("side", "parts", "light")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with random weights: four layers, six experts in two of them."""
    tasks = [{**TASKS[0], "labels": ["left", "right"]}, *TASKS[1:]]
    moe = {**VIT["moe"], "num_experts": NUM_EXPERTS}
    model = build_model(read_model({**VIT, "tasks": tasks, "num_layers": 4, "moe": moe}))
    initialize(model, 5)
    values = to_hf(model.config, "float32", {})
    family = FAMILIES[values["model_type"]]
    plans = plan_weights(model.config, family, DecoderWeights(model), torch.float32, torch.float32)
    target = tmp_path_factory.mktemp("vision") / "model"
    write_model_folder(target, values, plans, lambda folder: None, {})
    return target


def test_a_plan_speaks_of_patches(folder, capsys, monkeypatch):
    monkeypatch.setattr(outlook, "memory_bandwidth", lambda: 1e10)
    assert command(["plan", str(folder), "--expert-memory", "50%"]) == 0
    said = capsys.readouterr().out
    assert "a patch visits 4" in said and "keep no keys and values" in said
    assert "patches/s are upper bounds for one patch at a time" in said and "token" not in said


def two_experts(folder: Path) -> str:
    files = ModelFolder(folder)
    width, inner = files.config.d_model, files.config.moe.d_expert
    each = 4 * (2 * inner * width + inner + width)
    assert count_slots(files, torch.float32, 2 * each) == 2
    files.close()
    return f"{2 * each}B"


def watch(store) -> list[tuple[int, int]]:
    """Note each (layer, expert) as it is computed, and that the next one is on its way then."""
    came, stream = [], store.stream

    def watched(layer, rows_of, *others) -> Iterator:
        here = [expert for expert in rows_of if store.has(layer, expert)]
        left = [expert for expert in rows_of if expert not in here]
        for ready, experts in stream(layer, rows_of, *others):
            assert len(ready) <= 2
            came.extend((layer, expert) for expert in ready if expert not in here)
            left = [expert for expert in left if expert not in ready]
            if left and not here:  # one expert computes, and the other place is being filled
                coming = (layer, left[0])
                assert store.has(*coming) or store._slots.is_filling(coming)
            here = []
            yield ready, experts

    store.stream = watched
    return came


def test_two_experts_at_a_time_are_exact_and_come_in_order(folder):
    images = arrays(5, seed=9)["images"]
    model = moeyard.load_vision(folder)
    small, store = open_kind(folder, ("vit",), expert_memory=two_experts(folder))
    assert store.num_slots == 2 and "83% of the experts are on disk" in repr(small)
    came = watch(store)
    for task in TASK_NAMES:
        came.clear()
        assert torch.equal(model.scores(images, task), small.scores(images, task)), task
        assert came == sorted(came) and len(came) >= 2 * NUM_EXPERTS - 4
        assert store.counts().resident <= 2
    store.close()


def test_switching_the_task_moves_no_weights(folder):
    model, store = open_kind(folder, ("vit",), expert_memory="100%")
    images = arrays(3, seed=4)["images"]
    for task in TASK_NAMES:
        model(images, task)
    read = store.statistics.num_read()
    for task in (*TASK_NAMES, *TASK_NAMES):
        model(images, task)
    assert store.statistics.num_read() == read <= 2 * NUM_EXPERTS
    store.close()


def test_answers_are_labels_and_maps(folder):
    model = moeyard.load_vision(folder)
    assert model.tasks == TASK_NAMES and "side (classes)" in repr(model)
    images = arrays(3, seed=4)["images"]
    labels = model(list(images), "side")
    assert [set(one.probabilities) for one in labels] == [{"left", "right"}] * 3
    assert all(one.label == max(one.probabilities, key=one.probabilities.get) for one in labels)
    parts, light = model(images, "parts"), model(images / 255, "light")
    assert (parts.shape, parts.dtype) == ((3, 8, 12), np.uint8) and parts.max() < 3
    assert (light.shape, light.dtype) == ((3, 8, 12, 1), np.float32)
    assert np.array_equal(model(images, "parts", batch_images=1), parts)


@pytest.mark.parametrize(
    ("images", "task", "sentence"),
    [
        (np.zeros((1, 8, 12), np.uint8), None, "task is None; use one of side, parts, light"),
        (np.zeros((1, 8, 12), np.uint8), "edges", "task is 'edges'; use one of side"),
        (np.zeros((1, 8, 8), np.uint8), "side", r"channels \(8, 8, 1\), but the model reads"),
        (np.zeros((0, 8, 12), np.uint8), "side", "there are no images"),
        ([np.zeros((8, 12)), np.zeros((9, 12))], "side", r"have the sizes .* bring them to one"),
    ],
)
def test_images_and_tasks_that_the_model_does_not_have_are_refused(folder, images, task, sentence):
    with pytest.raises(ConfigError, match=sentence):
        moeyard.load_vision(folder)(images, task)


def test_the_command_prints_a_line_for_each_image(folder, tmp_path, capsys):
    images = arrays(2, seed=4)["images"]
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image).save(path)
    model = moeyard.load_vision(folder)
    names = [str(path) for path in paths]

    def lines(*arguments):
        assert command(["predict", str(folder), *arguments]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    def refused(sentence, *arguments):
        assert command(["predict", str(folder), *arguments]) == 2
        assert sentence in capsys.readouterr().err

    found = lines(*names, "--task", "side")
    assert [line["image"] for line in found] == names
    assert [line["label"] for line in found] == [one.label for one in model(images, "side")]
    out = tmp_path / "out"
    found = lines(*names, "--task", "parts", "--out", str(out), "--expert-memory", "50%")
    maps = np.stack([np.asarray(Image.open(line["map"])) for line in found])
    assert np.array_equal(maps, model(images, "parts"))
    np.savez(tmp_path / "all.npz", images=images)
    found = lines(str(tmp_path / "all.npz"), "--task", "light", "--out", str(out))
    maps = np.stack([np.load(line["map"]) for line in found])
    assert np.array_equal(maps, model(images, "light"))
    refused("gives maps of pixels; name a folder with --out", names[0], "--task", "parts")
    refused("task is 'edges'; use one of side, parts, light", names[0], "--task", "edges")
    refused("which is not there; give another", str(tmp_path / "c.png"), "--task", "side")
    refused("two images have the name 'a'", names[0], names[0], "--task", "side")
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(paths[0])
    refused("has 4 x 4 pixels, but the model reads 8 x 12", names[0], "--task", "side")
