"""A stop request ends a run while its series, images or log are read."""

import pytest

from moeyard.errors import Stopped
from moeyard.moe.items.table import FILE
from moeyard.parallel.mesh import Mesh
from moeyard.training.objectives.table import OBJECTIVES
from moeyard.training.read_config import complete_run_config
from moeyard.training.stop import StopRequest

import clicks
import pictures
import small_images
import small_series


def series(folder):
    return small_series.values(small_series.write(folder / "s.csv"), folder / "run")


def images(folder):
    return with_images("images", small_images.VIT, small_images.write_arrays(folder / "all.npz"))


def super_resolution(folder):
    return with_images("super_resolution", pictures.MODEL, pictures.write(folder / "all.npz"))


def sessions(folder):
    (folder / "items").mkdir()
    (folder / "items" / FILE).write_text(clicks.small_table().text())
    (folder / "log.csv").write_text("user,session,item,watch_s,liked\nu,s,none,1,1\n")
    data = {"source": str(folder / "log.csv"), "items": str(folder / "items"), "session_items": 3}
    data = {"format": "sessions", **data}
    return {"run_dir": "unset", "model": clicks.MODEL, "data": data, "train": clicks.TRAIN}


def with_images(kind, model, source):
    data = {"format": kind, "source": str(source)}
    return {"run_dir": "unset", "model": model, "data": data, "train": {"steps": 1}}


@pytest.mark.parametrize("values", [series, images, super_resolution, sessions])
def test_a_stop_request_ends_the_reading(values, tmp_path):
    config = complete_run_config(values(tmp_path))
    stop = StopRequest()
    stop.signal_name = "SIGTERM"
    with pytest.raises(Stopped, match="stopped by SIGTERM while reading"):
        OBJECTIVES[config.data.format].open_data(config, tmp_path / "data", Mesh(), stop)
    assert not list((tmp_path / "data").iterdir())
