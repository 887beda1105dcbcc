"""What every model of time series is.

B series, L points of each, H points ahead, Q quantiles.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ..routers.routing import Routing
from .model import WholeModel


class SeriesLoss(NamedTuple):
    """The loss of some windows of series."""

    loss_sum: Tensor
    """Summed over the targets, at least in fp32."""
    num_targets: int
    routings: list[Routing]
    """One per layer of :meth:`Model.routed_layers`, in order."""


class SeriesForecast(NamedTuple):
    """What comes after some series, in their units."""

    mean_BH: Tensor
    """fp32: the mean, or the only value of a model that forecasts points."""
    quantiles_BHQ: Tensor | None
    """fp32: in the order of the quantiles asked for; None if the model forecasts points."""


class SeriesModel(WholeModel):
    """A model that learns from windows of series, and continues series.

    Values are numbers on any scale. Whether a model scales each window is part of the model. A
    point that was not observed has any finite value, and ``observed`` says so.
    """

    forecasts_quantiles: bool = False
    """Whether a forecast is a distribution, and not one value for each point."""

    @property
    def most_points(self) -> int:
        """Most points of a context and its forecast together."""
        return self.config.max_positions

    def rows_of_window(self, length: int) -> int:
        """Return the rows that :meth:`score` computes for a window of ``length`` points.

        The first point was observed. Here each point is a row, but the last is a target only.
        """
        return length - 1

    @abstractmethod
    def score(self, values_BL: Tensor, observed_BL: Tensor) -> SeriesLoss:
        """Return the loss of windows; all of their points are context and targets.

        ``values_BL`` has a floating-point type, ``observed_BL`` is bool. B may be 0.
        """

    @abstractmethod
    def num_targets(self, values_BL: Tensor, observed_BL: Tensor) -> int:
        """Return the targets that :meth:`score` counts in windows."""

    @abstractmethod
    def predict(
        self,
        values_BL: Tensor,
        observed_BL: Tensor,
        horizon: int,
        quantiles: Sequence[float] = (),
        seed: int = 0,
    ) -> SeriesForecast:
        """Return the next ``horizon`` points of each series.

        A model that draws samples draws those of ``seed``; a series' forecast does not depend on
        the others in the batch.
        """
