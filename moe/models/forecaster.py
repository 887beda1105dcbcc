"""A model of time series that continues series, in their own units.

N series, L points read of each, H points ahead, Q quantiles.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from ...errors import ConfigError
from .describe import describe
from .series_model import SeriesModel
from .series_values import Series, alike, filled, numbers_of, rows_of

USUAL_QUANTILES = (0.1, 0.5, 0.9)
MOST_HORIZON = 100_000
"""Points ahead; more are a slip."""
LEAST_POINTS = 2
"""One point says nothing about how a series moves."""
MOST_UNOBSERVED = 0.5
"""Share of a context: with more gaps than points, a forecast would be of the gaps."""


class Forecast(NamedTuple):
    """What comes after one series, fp64 in its units."""

    mean: np.ndarray
    """``[H]``: the mean, or the only value of a model that forecasts points."""
    quantiles: dict[float, np.ndarray] | None
    """``[H]`` each; None if the model forecasts points."""


class Question(NamedTuple):
    """What is asked of a model, checked."""

    horizon: int
    quantiles: tuple[float, ...]
    context: int
    """Points read at most."""
    seed: int = 0


class Forecaster:
    """A series model that :func:`moeyard.load_forecaster` opened. Call it with series.

    ``config`` has its shape, ``model`` is the torch module.
    """

    def __init__(self, model: SeriesModel) -> None:
        self.model = model.eval()
        self.config = model.config

    def __repr__(self) -> str:
        """Show layers, widths, experts, parameters, type, device and the share on disk."""
        return f"Forecaster({describe(self.model)}\n)"

    def __call__(
        self,
        series: Series,
        horizon: int,
        quantiles: Sequence[float] | None = None,
        context: int | None = None,
        seed: int = 0,
        batch_series: int = 32,
    ) -> list[Forecast]:
        """Return the next ``horizon`` points of each series.

        ``series`` is one series or several, of any lengths: lists or arrays, with NaN or None for
        points that were not observed. ``quantiles`` are between 0 and 1; None = 0.1, 0.5 and 0.9
        where the model forecasts a distribution. The last ``context`` points are read; None = the
        model's most. ``seed`` is that of models that draw samples. A series whose context is
        constant goes on as it is. Raises :class:`ConfigError` for what cannot be continued.
        """
        if batch_series < 1:
            raise ConfigError(f"batch_series is {batch_series}; use a number from 1 upwards.")
        question = self.question(horizon, quantiles, context, seed)
        contexts = [self.context_of(one, f"series {n}", question) for n, one in rows_of(series)]
        found: list[Forecast | None] = [None] * len(contexts)
        for places in alike(contexts, batch_series):
            forecasts = self.run([contexts[place] for place in places], question)
            for place, forecast in zip(places, forecasts, strict=True):
                found[place] = forecast
        return [forecast for forecast in found if forecast is not None]

    def question(
        self,
        horizon: int,
        quantiles: Sequence[float] | None = None,
        context: int | None = None,
        seed: int = 0,
    ) -> Question:
        """Check what is asked; raises :class:`ConfigError`."""
        if not 1 <= horizon <= MOST_HORIZON:
            raise ConfigError(f"horizon is {horizon}; use a number from 1 to {MOST_HORIZON}.")
        most = self.model.longest_context(horizon)
        if most < LEAST_POINTS:
            raise ConfigError(
                f"horizon is {horizon}, which leaves no positions of the model for a context; use "
                "a smaller one."
            )
        if context is not None and not LEAST_POINTS <= context <= most:
            raise ConfigError(
                f"context is {context}; use a number from {LEAST_POINTS} to {most}, the points "
                f"that the model reads before a horizon of {horizon}."
            )
        for quantile in quantiles or ():
            if not 0 < quantile < 1:
                raise ConfigError(f"quantiles has {quantile}; use numbers between 0 and 1.")
        if quantiles and len(set(quantiles)) < len(quantiles):
            raise ConfigError(f"quantiles is {list(quantiles)}; give each one once.")
        if not 0 <= seed < 1 << 63:
            raise ConfigError(f"seed is {seed}; use a number from 0 upwards, below 2^63.")
        if quantiles and not self.model.forecasts_quantiles:
            raise ConfigError(
                f"quantiles is {list(quantiles)}, but the model forecasts points and has none; "
                "leave it out."
            )
        asked = tuple(USUAL_QUANTILES if quantiles is None else quantiles)
        if not self.model.forecasts_quantiles:
            asked = ()
        return Question(horizon, asked, context or most, seed)

    def context_of(self, values: Series, name: str, question: Question) -> np.ndarray:
        """Return what is read of one series, fp64 ``[L]``, with NaN where it was not observed.

        Points before the first observed one are left out. ``name`` is the series' in messages.
        Raises :class:`ConfigError`.
        """
        values_L = numbers_of(values, name)[-question.context :]
        observed_L = ~np.isnan(values_L)
        count = int(observed_L.sum())
        if count < LEAST_POINTS:
            raise ConfigError(
                f"{name} has {count} observed point{'' if count == 1 else 's'} among the last "
                f"{len(values_L)}, but a forecast needs {LEAST_POINTS}; give a longer series."
            )
        values_L = values_L[int(observed_L.argmax()) :]
        missing = len(values_L) - count
        if missing > MOST_UNOBSERVED * len(values_L):
            raise ConfigError(
                f"{name} lacks {missing} of the {len(values_L)} points that are read, but at most "
                "half may be missing; fill the gaps, or choose another context."
            )
        return values_L

    @torch.inference_mode()
    def run(self, contexts: Sequence[np.ndarray], question: Question) -> list[Forecast]:
        """Return the forecasts of contexts of equal length, which :meth:`context_of` made."""
        constant = [_constant_of(context_L) for context_L in contexts]
        moving = [c for c, value in zip(contexts, constant, strict=True) if value is None]
        predicted = iter(self._predict(moving, question) if moving else ())
        return [
            next(predicted) if value is None else self._flat(value, question) for value in constant
        ]

    def _flat(self, value: float, question: Question) -> Forecast:
        """Return the forecast of a series that has had one value only."""
        flat_H = np.full(question.horizon, value)
        if not self.model.forecasts_quantiles:
            return Forecast(flat_H, None)
        return Forecast(flat_H, {quantile: flat_H.copy() for quantile in question.quantiles})

    def _predict(self, contexts: list[np.ndarray], question: Question) -> list[Forecast]:
        """Return the forecasts of contexts that are not constant."""
        values_NL = np.array(contexts, dtype=np.float64)
        observed_NL = ~np.isnan(values_NL)
        found = self.model.predict(
            torch.from_numpy(filled(values_NL)).to(self.model.device),
            torch.from_numpy(observed_NL).to(self.model.device),
            question.horizon,
            question.quantiles,
            question.seed,
        )
        mean_NH = found.mean_BH.double().cpu().numpy()
        if found.quantiles_BHQ is None:
            return [Forecast(mean_H, None) for mean_H in mean_NH]
        quantiles_NQH = found.quantiles_BHQ.double().cpu().numpy().transpose(0, 2, 1)
        return [
            Forecast(mean_H, dict(zip(question.quantiles, quantiles_QH, strict=True)))
            for mean_H, quantiles_QH in zip(mean_NH, quantiles_NQH, strict=True)
        ]


def _constant_of(context_L: np.ndarray) -> float | None:
    """Return the value that all observed points have, if there is one."""
    low, high = np.nanmin(context_L), np.nanmax(context_L)
    return float(low) if low == high else None
