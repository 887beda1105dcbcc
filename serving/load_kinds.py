"""Open folders of models that do not continue texts, each as what takes its user's data.

The arguments are those of :func:`moeyard.load`; ``options`` are those of the expert store. All
raise what that function raises, and :class:`ConfigError` for a model of another kind.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar, Unpack

from ..moe.models.forecaster import Forecaster
from ..moe.models.recommender import Recommender
from ..moe.models.text_classifier import TextClassifier
from ..moe.models.text_writer import TextWriter
from ..moe.models.upscaler import Upscaler
from ..moe.models.vision_model import VisionModel
from .loading import Loading, open_kind
from .openers.series import SERIES_KINDS

Opened = TypeVar("Opened")


def load_classifier(folder: str | Path, **how: Unpack[Loading]) -> TextClassifier:
    """Open a folder with an encoder, such as BERT's or a run's export."""
    return _open(TextClassifier, folder, ("encoder",), **how)


def load_forecaster(folder: str | Path, **how: Unpack[Loading]) -> Forecaster:
    """Open a folder with a model of time series, such as a run's export."""
    return _open(Forecaster, folder, SERIES_KINDS, **how)


def load_seq2seq(folder: str | Path, **how: Unpack[Loading]) -> TextWriter:
    """Open a folder with an encoder-decoder of texts, such as T5's or a run's export."""
    return _open(TextWriter, folder, ("encoder_decoder",), **how)


def load_recommender(folder: str | Path, **how: Unpack[Loading]) -> Recommender:
    """Open the export of a run on sessions, which has a table of items."""
    return _open(Recommender, folder, ("recommender",), **how)


def load_vision(folder: str | Path, **how: Unpack[Loading]) -> VisionModel:
    """Open a folder with a vision transformer, such as a run's export."""
    return _open(VisionModel, folder, ("vit",), **how)


def load_upscaler(folder: str | Path, **how: Unpack[Loading]) -> Upscaler:
    """Open a folder with a super-resolution model, such as a run's export."""
    return _open(Upscaler, folder, ("super_resolution",), **how)


def _open(
    wanted: type[Opened], folder: str | Path, kinds: Sequence[str], **how: Unpack[Loading]
) -> Opened:
    model, _ = open_kind(folder, kinds, **how)
    assert isinstance(model, wanted), "its kind was asked for"
    return model
