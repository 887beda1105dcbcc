"""Training models that enlarge images: the data, the loss, the measures, what comes out."""

import itertools
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import moeyard
from moeyard.cli import main as command
from moeyard.errors import ConfigError, DataError
from moeyard.moe.diffusion.images import from_bytes, larger, smaller
from moeyard.moe.diffusion.measures import psnr
from moeyard.moe.models.upscaler import Upscaler
from moeyard.moe.routes.reader import read_routes
from moeyard.serving.serve_args import ServeArgs
from moeyard.serving.server_budgets import with_budgets
from moeyard.training.checkpoints.export import export
from moeyard.training.data import image_files
from moeyard.training.data.image_files import read_images, write_images
from moeyard.training.report.page import write_report

import pictures
from small_trainer import check_resumed, finished, metrics, trainer, write_config

TRAIN = {"steps": 4, "batch_sequences": 4, "log_every": 1, "eval_every": 2, "eval_sequences": 99}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("denoise")
    data = {
        "format": "super_resolution",
        "source": str(pictures.write(folder / "images.npz")),
        "eval_fraction": 0.25,
        "eval_images": 3,
        "eval_steps": 3,
    }
    sections = {"model": pictures.MODEL, "data": data, "checkpoint": {"every": 2}}
    return write_config(folder, train=TRAIN, **sections)


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    return finished(config, tmp_path_factory.mktemp("whole"), "monitor.routes={}")


@pytest.fixture(scope="module")
def folder(whole, tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "model"
    export(whole[1], path)
    return path


def test_a_run_measures_what_it_learns_and_where_patches_went(whole):
    last = metrics(whole[1])[-1]
    assert {"eval_loss", "eval_psnr", "load"} <= last.keys()
    assert [sum(counts) for counts in last["expert_tokens"]] == [4 * 16] * 2
    assert last["expert_tokens"][1] == [16] * 4 and last["tokens"] == 4 * 4 * 16
    routes = read_routes(whole[1] / "routes")
    assert len(routes.tokens_N) == 4 * 4 * 16
    page = write_report(whole[1], None)[0].read_text(encoding="utf-8")
    assert "PSNR in dB" in page and "Expert load" in page


def test_measures_are_those_of_the_held_out_images(whole, monkeypatch):
    run, run_dir = whole
    held_out, model = run._data.held_out, run.decoder.eval()
    module, last = run.objective.module(model), metrics(run_dir)[-1]
    assert len(held_out) == 6
    with torch.no_grad():
        losses = [module(held_out.fixed([image])).loss_sum for image in range(6)]
    assert last["eval_loss"] == pytest.approx(float(sum(losses)) / (6 * 3 * 64), rel=1e-5)
    right = from_bytes(np.stack([held_out.middle(image) for image in (0, 2, 4)]))
    upscaler, guide = Upscaler(model), larger(smaller(right, 2), 2)
    noise = held_out.fixed([0, 2, 4]).noise_BCSS
    found = []
    for own_CSS, own_guide in zip(noise, guide.split(1), strict=True):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "randn", lambda *_, own=own_CSS, **__: own)
            found.append(upscaler.enlarge(own_guide, 3))
    model.train()
    assert last["eval_psnr"] == pytest.approx(float(psnr(torch.cat(found), right).mean()), rel=1e-4)


def test_the_loss_is_the_mean_square_error_of_the_noise(whole):
    run = whole[0]
    rows = run.objective.batch(0, range(4), torch.device("cpu"))
    model = run.decoder.train()
    guide = larger(smaller(rows.images_BCSS, 2), 2)
    kept = model.schedule.kept_N[rows.times_B].view(-1, 1, 1, 1).float()
    residual = (rows.images_BCSS - guide) / run.decoder.config.residual_std
    mixed = kept.sqrt() * residual + (1 - kept).sqrt() * rows.noise_BCSS
    with torch.no_grad():
        part = run.objective.module(model)(rows)
        said = model.denoise(mixed, guide, rows.times_B, rows.draw_keys).noise_BCHW
    wanted = (said - rows.noise_BCSS).square().mean()
    mean = float(part.loss_sum) / part.num_targets
    assert mean == pytest.approx(float(wanted), rel=1e-5)
    assert part.num_targets == run.objective.divisor(0) == 4 * 3 * 8 * 8


def test_the_residual_has_the_standard_deviation_of_the_images(whole):
    run = whole[0]
    assert run.decoder.config.residual_std == run._data.residual_std
    images = from_bytes(run._data.train._images_NHWC)
    residual = run.decoder.residual(images, larger(smaller(images, 2), 2))
    assert float(residual.std()) == pytest.approx(1, abs=0.01)


def test_draws_depend_on_seed_step_and_row_alone(whole, config, tmp_path):
    data = whole[0]._data.train
    together = data.of_step(3, range(4))
    for row in range(4):
        alone = data.of_step(3, range(row, row + 1))
        for one, all_of_them in zip(alone[:3], together[:3], strict=True):
            assert torch.equal(one[0], all_of_them[row])
        assert alone.draw_keys == together.draw_keys[row : row + 1]
    assert not torch.equal(data.of_step(4, range(4)).noise_BCSS, together.noise_BCSS)
    assert len({*together.draw_keys, *data.of_step(4, range(4)).draw_keys}) == 8
    other = trainer(config, tmp_path / "run", "seed=1")._data.train.of_step(3, range(4))
    assert not torch.equal(other.noise_BCSS, together.noise_BCSS)
    times = torch.cat([data.of_step(step, range(4)).times_B for step in range(50)])
    assert times.min() < 100 and times.max() > 900 and len(times.unique()) > 100


def test_every_image_and_place_is_seen(whole):
    data, shown_in = whole[0]._data.train, {}
    for image, up, along in itertools.product(range(len(data)), range(5), range(5)):
        crop = from_bytes(data._images_NHWC[None, image, up : up + 8, along : along + 8])[0]
        shown_in.setdefault(crop.numpy().tobytes(), set()).add(image)
    crops = [crop for step in range(9) for crop in data.of_step(step, range(4)).images_BCSS]
    seen = [shown_in[crop.numpy().tobytes()] for crop in crops]
    assert set().union(*seen) == set(range(18))  # two epochs


def test_a_resumed_run_ends_as_one_that_was_not_stopped(config, whole, tmp_path):
    check_resumed(config, whole, tmp_path, "monitor.routes={}")


def test_export_reload_and_offload_are_the_same_bit_for_bit(whole, folder):
    run = whole[0]
    upscaler = moeyard.load_upscaler(folder)
    for name, weight in run.decoder.state_dict().items():
        assert torch.equal(upscaler.model.state_dict()[name], weight), name
    images = pictures.images(2, 7, seed=4)
    wanted = Upscaler(run.decoder)(images, steps=5)
    run.decoder.train()
    assert np.array_equal(upscaler(images, steps=5), wanted)
    small = moeyard.load_upscaler(folder, expert_memory="25%")
    assert "75% of the experts are on disk" in repr(small)
    assert np.array_equal(small(images, steps=5), wanted)
    small.announces_next = False
    assert np.array_equal(small(images, steps=5), wanted)
    traffic = small.model.layers[0].mlp.experts.store.statistics.layers
    assert traffic[0].hits + traffic[0].misses + traffic[0].prefetch_late > 0
    assert traffic[2].bytes_read == 0  # the average alone computes there
    narrow = moeyard.load_upscaler(folder, dtype="bf16")
    assert narrow.model.layers[2].mlp.average.fc1.dtype == torch.bfloat16
    assert narrow(images, steps=5).shape == wanted.shape


def test_a_run_goes_on_from_an_export_and_fills_in_what_a_folder_lacks(config, folder, tmp_path):
    run = trainer(config, tmp_path / "run", f"start_from={folder}", "model={}")
    first = load_file(folder / "model.safetensors")
    torch.testing.assert_close(
        run.decoder.layers[2].mlp.average.fc1, first["model.layers.2.mlp.average.fc1"]
    )
    shutil.copytree(folder, tmp_path / "lacks")
    left = {name: t for name, t in first.items() if ".average." not in name}
    save_file(left, tmp_path / "lacks" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "lacks" / "expert_hashes.json").unlink(missing_ok=True)
    again = trainer(config, tmp_path / "again", f"start_from={tmp_path / 'lacks'}", "model={}")
    torch.testing.assert_close(
        again.decoder.layers[2].mlp.average.fc2, first["model.layers.2.mlp.average.fc2"]
    )


def test_the_command_enlarges_files(folder, tmp_path, capsys):
    pillow = image_files.open_pillow()
    picture, model = tmp_path / "in.png", str(folder)
    write_images(picture, pictures.images(1, 6), "images")
    assert command(["upscale", model, str(picture), str(tmp_path / "out.png"), "--steps", "3"]) == 0
    assert "event=upscaled images=1 width=12 height=12" in capsys.readouterr().err
    with pillow.open(tmp_path / "out.png") as image:
        found = np.asarray(image)
    wanted = moeyard.load_upscaler(folder)(pictures.images(1, 6), steps=3)
    assert np.array_equal(found, wanted[0])
    some = pictures.write(tmp_path / "in.npz", pictures.images(2, 6))
    memory = ["--expert-memory", "25%", "--steps", "3"]
    assert command(["upscale", model, str(some), str(tmp_path / "out.npz"), *memory]) == 0
    wanted = moeyard.load_upscaler(folder)(pictures.images(2, 6), steps=3)
    assert np.array_equal(np.load(tmp_path / "out.npz")["images"], wanted)
    capsys.readouterr()
    for arguments, message in (
        ([str(some), "x.png"], "OUT is 'x.png', but IN is a .npz file; name a .npz file"),
        ([str(tmp_path / "none.png"), "x.png"], "none.png', which is not a file; give another"),
        ([str(folder / "config.json"), "x.png"], "config.json cannot be read as an image"),
        ([str(picture), "x.png", "--steps", "0"], "steps is 0; use a number from 1 to 1000"),
        ([str(picture), str(tmp_path / "x.none")], "x.none cannot be written"),
    ):
        assert command(["upscale", model, *arguments]) == 2
        assert message in capsys.readouterr().err


def test_other_commands_say_what_opens_it(folder, capsys):
    assert command(["generate", str(folder), "x"]) == 2
    assert "use moeyard upscale or moeyard.load_upscaler for this one" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="which is not served; use moeyard upscale or moeyard"):
        with_budgets(ServeArgs(model=str(folder)))


BAD = {
    "side": np.zeros((9, 7, 12, 3), np.uint8),
    "channels": np.zeros((9, 12, 12, 1), np.uint8),
    "range": np.full((9, 12, 12, 3), 1.5),
    "nan": np.full((9, 12, 12, 3), np.nan),
    "type": np.zeros((9, 12, 12, 3), np.int64),
    "shape": np.zeros((9, 12), np.uint8),
    "few": np.zeros((1, 12, 12, 3), np.uint8),
    "equal": np.zeros((9, 12, 12, 3), np.uint8),
}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("side", "data.source has images of 12 x 7 pixels, but model.image_size is 8; give larger"),
        ("channels", r"has images with 1 channel\(s\), but model.channels is 3; change one of"),
        ("range", "has the value 1.5; give bytes, or numbers from 0 to 1"),
        ("nan", "has the value nan; give bytes"),
        ("type", "has values of type int64; give bytes"),
        ("shape", r"has an array of shape \[9, 12\]; give images of one size"),
        ("few", r"whose 1 image\(s\) leave none to hold out; give more that differ, or data.eval"),
        ("equal", r"whose 9 image\(s\) leave none to train on; give more that differ"),
    ],
)
def test_images_that_cannot_be_trained_on_are_refused(config, tmp_path, name, message):
    path = pictures.write(tmp_path / "bad.npz", BAD[name])
    with pytest.raises(DataError, match=message):
        trainer(config, tmp_path / "run", f"data.source={path}")


def test_files_that_are_no_images_are_refused(config, tmp_path):
    (tmp_path / "text.npz").write_text("no array")
    (tmp_path / "a.txt").write_text("no image")
    (tmp_path / "folder").mkdir()
    for source, message in (
        (tmp_path / "none.npz", "none.npz', which is not there; give another path"),
        (tmp_path / "a.txt", "but data.format is super_resolution; give a .npz file"),
        (tmp_path / "text.npz", "text.npz', which cannot be read .*; write it again with"),
        (tmp_path / "folder", "which has no images; give a folder with files such as a.png"),
    ):
        with pytest.raises((ConfigError, DataError), match=message):
            trainer(config, tmp_path / "run", f"data.source={source}")
    with pytest.raises(DataError, match="has no array 'faces', but images; name one with"):
        trainer(config, tmp_path / "run", "data.images_key=faces")


def test_a_folder_of_images_is_read_and_unequal_ones_are_refused(tmp_path):
    wanted = pictures.images(2, 12)
    for number, image in enumerate(wanted):
        write_images(tmp_path / f"{number}.png", image[None], "images")
    assert np.array_equal(read_images(str(tmp_path), "data.source", "images", 3), wanted)
    assert read_images(str(tmp_path), "data.source", "images", 1).shape == (2, 12, 12, 1)
    write_images(tmp_path / "2.png", pictures.images(1, 10), "images")
    with pytest.raises(DataError, match=r"2.png has 10 x 10 pixels and 0.png 12 x 12; cut or resi"):
        read_images(str(tmp_path), "data.source", "images", 3)
    with pytest.raises(ConfigError, match=r"model.channels is 2, which image files do not have"):
        read_images(str(tmp_path), "data.source", "images", 2)


def test_without_pillow_image_files_get_one_sentence(tmp_path, monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(image_files.importlib, "import_module", absent)
    with pytest.raises(ConfigError, match=r"\(pillow\); pip install 'moeyard\[images\]', or give"):
        image_files.read_image(tmp_path / "x.png", 3)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data={format: text}"], "data.format is text, which trains models of kind decoder, but"),
        (
            ["train.parameters=lora"],
            "model.kind is super_resolution, whose weights have no",
        ),
        (["parallel.pp=2"], "model.kind is super_resolution, which is not split into stages"),
        (["model.moe.router={kind: task}"], "router.kind is task, which reads the task"),
    ],
)
def test_runs_that_cannot_work_are_refused(config, tmp_path, overrides, message):
    with pytest.raises((ConfigError, DataError), match=message):
        trainer(config, tmp_path / "run", *overrides)
