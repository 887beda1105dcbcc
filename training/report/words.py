"""The words for what a run trains on, by the kinds of its data and its model."""

from ...moe.config.kinds import kind_of as kind_of_model
from ...moe.config.model import LayersConfig
from ..formats.data_section import AnyDataConfig
from ..formats.table import kind_of as kind_of_data
from .read import Run


def data_of(run: Run) -> type[AnyDataConfig]:
    """Return the kind of a run's data; what all kinds share for one that is not known."""
    return kind_of_data(run.config.get("data", {})) or AnyDataConfig


def model_of(run: Run) -> type[LayersConfig]:
    """Return the kind of a run's model; what all kinds share for one that is not known."""
    return kind_of_model(run.config.get("model", {})) or LayersConfig
