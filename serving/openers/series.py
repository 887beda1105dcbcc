"""Open a model that continues time series."""

from ...moe.folders.folder import ModelFolder
from ...moe.folders.series_scales import read_trained_on
from ...moe.models.forecaster import Forecaster
from ...moe.models.series_model import SeriesModel
from ..experts.options import StoreOptions
from ..filling import Filled
from .opener import Opener, refuse_correction

SERIES_KINDS = ("time_moe", "moirai")
"""The kinds of models of time series."""


def _open(files: ModelFolder, filled: Filled, options: StoreOptions) -> Forecaster:
    model = filled.model
    assert isinstance(model, SeriesModel), "its configuration is a series model's"
    refuse_correction(files, options)
    return Forecaster(model, read_trained_on(files.path))


SERIES = Opener(_open, "a model of series", "moeyard forecast or moeyard.load_forecaster")
