"""Training on several tasks of images: the loss, the measures, what comes out, how it is used."""

import json
import socket

import pytest
import torch
import torch.nn.functional as F

import moeyard
from moeyard.errors import ConfigError
from moeyard.moe.config.vision_tasks import PixelClassesTask, PixelValuesTask
from moeyard.moe.routes.reader import read_routes
from moeyard.parallel.mesh import Mesh
from moeyard.serving.frozen_experts import open_frozen
from moeyard.training.checkpoints.export import export
from moeyard.training.objectives.task_measures import measure_of, task_loss
from moeyard.training.observers.prometheus import PrometheusPort
from moeyard.training.read_config import read_run_config
from moeyard.training.report.page import render
from moeyard.training.report.read import read_run
from moeyard.training.trainer import Trainer

from small_images import TASKS, VIT, arrays, write_arrays
from small_trainer import check_resumed, finished, metrics, trainer, write_config

TRAIN = {"steps": 6, "batch_sequences": 8, "eval_every": 3, "log_every": 1}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    source = str(write_arrays(folder / "all.npz"))
    data = {"format": "images", "source": source, "eval_fraction": 0.2}
    return write_config(folder, model=VIT, data=data, train=TRAIN)


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    return finished(config, tmp_path_factory.mktemp("whole"), "monitor.routes={}")


@pytest.fixture(scope="module")
def folder(whole, tmp_path_factory):
    found = tmp_path_factory.mktemp("export") / "model"
    export(whole[1], found)
    return found


def test_the_loss_of_a_step_is_the_weighted_sum_of_means_over_targets(whole):
    run, _ = whole
    objective, loss = run.objective, 0.0
    vit = run.decoder
    rows = objective.batch(2, range(8), torch.device("cpu"))
    module = objective.module(vit).eval()
    with torch.no_grad():
        part = module(rows)
    for task, places, target, (answer, own) in zip(
        vit.config.tasks, rows.places, rows.targets, part.told, strict=True
    ):
        assert len(places) == len(target) == len(answer) == len(own)
        each = []
        for one, wanted in zip(answer, target, strict=True):
            if task.kind == "classes":
                each.append(-one.log_softmax(0)[wanted])
            elif task.kind == "pixel_classes":
                there = wanted != 255
                chosen = one.log_softmax(0).permute(1, 2, 0)[there]
                each.append(-chosen.gather(1, wanted[there].long()[:, None]).mean())
            else:
                there = ~wanted.isnan()
                each.append((one.permute(1, 2, 0)[there] - wanted[there]).square().mean())
        loss += task.loss_weight * float(torch.stack(each).mean())
    assert float(part.loss_sum) / objective.divisor(2) == pytest.approx(loss, rel=1e-5)


def test_a_step_in_parts_has_the_same_loss(whole):
    run, _ = whole
    module = run.objective.module(run.decoder).eval()
    with torch.no_grad():
        parts = [
            module(run.objective.batch(1, rows, torch.device("cpu")))
            for rows in (range(8), range(3), range(3, 8), range(0))
        ]
    sums = [float(part.loss_sum) for part in parts]
    assert sums[0] == pytest.approx(sums[1] + sums[2], rel=1e-5) and sums[3] == 0


def test_a_run_measures_each_task_and_counts_its_rows(whole):
    run, run_dir = whole
    last = metrics(run_dir)[-1]
    measures = {"eval_accuracy_side", "eval_miou_parts", "eval_rmse_light", "load"}
    assert measures <= last.keys()
    rows = run.objective.num_tokens(range(5, 6))
    assert [sum(counts) for counts in last["expert_tokens"]] == [2 * rows]
    losses = [task["name"] for task in TASKS]
    weights = [task.get("loss_weight", 1) for task in TASKS]
    total = sum(w * last[f"eval_loss_{name}"] for w, name in zip(weights, losses, strict=True))
    assert last["eval_loss"] == pytest.approx(total)


def test_the_report_and_prometheus_show_each_task(whole, config):
    page = render(read_run(whole[1]))
    measures = ("side, accuracy", "parts, mean IoU", "light, error", "Expert load")
    for words in (*measures, "sum over tasks", "patches/s", "active per patch", "8 images"):
        assert words in page, words
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    observer = PrometheusPort(read_run_config(config, [f"monitor.prometheus_port={port}"]))
    try:
        observer.record(metrics(whole[1])[-1])
        found = observer.registry.get_sample_value(
            "moeyard_train_held_out", {"measure": "rmse_light"}
        )
        helps = {family.name: family.documentation for family in observer.registry.collect()}
    finally:
        observer.close()
    assert found == metrics(whole[1])[-1]["eval_rmse_light"]
    assert helps["moeyard_train_eval_loss"] == "Of held-out data: sum over tasks"
    assert helps["moeyard_train_tokens"] == "Patches trained on"


@pytest.mark.slow
def test_a_run_learns(config, tmp_path):
    trainer(config, tmp_path / "longer", "train.steps=150", "train.eval_every=0").run()
    last = metrics(tmp_path / "longer")[-1]
    assert last["eval_accuracy_side"] > 0.9 and last["eval_miou_parts"] > 0.8
    assert last["eval_rmse_light"] < 0.1


def test_measures_are_their_formulas():
    task = PixelClassesTask(name="x", classes=3)
    said = torch.tensor([[[0, 0, 1, 1, 0]]])
    wanted = torch.tensor([[[0, 1, 1, 255, 0]]], dtype=torch.uint8)
    answer = F.one_hot(said, 3).permute(0, 3, 1, 2).float()
    measure = measure_of(task)
    measure.add(answer, wanted)
    # Class 0: 2 of 3 pixels; class 1: 1 of 2; class 2 never occurs, and a pixel has no class.
    assert measure.value(measure.sums) == pytest.approx((2 / 3 + 1 / 2) / 2)
    values = PixelValuesTask(name="y")
    target = torch.tensor([1.0, float("nan"), 5.0]).view(1, 1, 3, 1)
    measure = measure_of(values)
    measure.add(torch.tensor([2.0, 9.0, 3.0]).view(1, 1, 1, 3), target)
    assert measure.value(measure.sums) == pytest.approx(2.5**0.5)
    assert task_loss(values, torch.zeros(1, 1, 1, 3), target).tolist() == [13.0]


def test_a_resumed_run_ends_as_one_that_was_not_stopped(config, whole, tmp_path):
    check_resumed(config, whole, tmp_path, "monitor.routes={}")


def test_routes_of_a_run_have_every_row_and_its_task(whole):
    run, run_dir = whole
    routes = read_routes(run_dir / "routes")
    assert len(routes.tokens_N) == run.objective.num_tokens(range(6))
    assert set(routes.tokens_N.tolist()) == {0, 1, 2}
    of_step = routes.steps_N == 1
    keys = set(zip(routes.sequences_N[of_step], routes.positions_N[of_step], strict=True))
    assert len(keys) == of_step.sum()  # no two passes have one number


def test_a_reloaded_model_answers_as_the_trained_one(whole, folder):
    run, _ = whole
    model = moeyard.load_vision(folder)
    for name, weight in run.decoder.state_dict().items():
        assert torch.equal(model.vit.state_dict()[name], weight), name
    rows = run._data.held_out.rows(range(4))
    with torch.no_grad():
        told = run.objective.module(run.decoder).eval()(rows).told
    order = rows.tasks_P.tolist()
    for number, (task, places) in enumerate(zip(model.tasks, rows.places, strict=True)):
        images = ((rows.pixels_PCHW[places, 0] + 1) * 127.5).round().to(torch.uint8).numpy()
        torch.testing.assert_close(model.scores(images, task), told[number][0])
    assert sorted(order) == sorted(rows.tasks_P.tolist())


def test_a_run_goes_on_from_a_folder_with_another_task_and_frozen_experts(
    config, whole, folder, tmp_path
):
    tasks = [*TASKS[:2], {"name": "height", "kind": "pixel_values"}]
    source = write_arrays(tmp_path / "all.npz", height=arrays()["light"])
    found = []
    for name, memory in (("all", []), ("half", ["train.expert_memory=50%"])):
        start = [f"start_from={folder}", f"model={json.dumps({'tasks': tasks})}"]
        overrides = [*start, "train.parameters=router", f"data.source={source}", *memory]
        run_dir = tmp_path / name
        run_dir.mkdir()
        own = read_run_config(config, [f"run_dir={run_dir}", *overrides])
        run = Trainer(own, run_dir, Mesh(), open_source=open_frozen)
        assert torch.equal(run.decoder.head_side.weight, whole[0].decoder.head_side.weight)
        assert not hasattr(run.decoder, "head_light")
        found.append([run._step.run(step, False).loss for step in range(2)])
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_a_run_on_images_needs_a_model_for_images(config, tmp_path):
    with pytest.raises(ConfigError, match=r"trains models of kind vit, but model\.kind is decoder"):
        decoder = {"kind": "decoder", "d_model": 16, "num_layers": 1, "num_heads": 2, "d_ff": 8}
        trainer(config, tmp_path / "run", f"model={json.dumps(decoder)}")


def test_an_evaluation_of_an_image_without_a_target_has_no_loss(config, tmp_path, monkeypatch):
    own = ["model.tasks=[{name: side, kind: classes}]", "model.moe.router.num_tasks=1"]
    run = trainer(config, tmp_path / "run", *own)
    objective, found = run.objective, []
    for image in range(len(objective.data.held_out)):
        monkeypatch.setattr(objective, "held_out_windows", lambda _, image=image: [image])
        found.append(objective.evaluate(run._loss, Mesh()))
    assert {one.num_tokens for one in found} == {0, 1}
    for one in found:
        assert ("eval_loss" in one.metrics) == (one.num_tokens > 0)
