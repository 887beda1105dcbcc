"""A model of time series that continues series, in their own units.

N series, L points read of each, H points ahead, Q quantiles.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from ...errors import ConfigError
from .describe import describe
from .series_model import SeriesModel
from .series_values import (
    Context,
    Forecast,
    Scale,
    Series,
    alike,
    check_scaled,
    numbers_of,
    rows_of,
    scale_of,
)

USUAL_QUANTILES = (0.1, 0.5, 0.9)
MOST_HORIZON = 100_000
"""Points ahead; more are a slip."""
LEAST_POINTS = 2
"""One point says nothing about how a series moves."""
MOST_UNOBSERVED = 0.5
"""Share of a context: with more gaps than points, a forecast would be of the gaps."""


class Question(NamedTuple):
    """What is asked of a model, checked."""

    horizon: int
    quantiles: tuple[float, ...]
    context: int
    """Points read at most."""
    seed: int = 0


class TrainedOn(NamedTuple):
    """What a model of a run was trained on."""

    context: int | None = None
    """Points that its forecasts were measured with; None = not known."""
    scales: Mapping[str, Scale] = {}
    """By column: how training scaled it."""


class Forecaster:
    """A series model that :func:`moeyard.load_forecaster` opened. Call it with series.

    A series is scaled by the mean and the deviation of what is read of it, and one of a column that
    the model was trained on as it was there. ``config`` has the model's shape, ``model`` is the
    torch module.
    """

    def __init__(self, model: SeriesModel, trained_on: TrainedOn | None = None) -> None:
        self.model = model.eval()
        self.config = model.config
        self.trained_on = trained_on or TrainedOn()

    def __repr__(self) -> str:
        """Show layers, widths, experts, parameters, type, device and the share on disk."""
        return f"Forecaster({describe(self.model)}\n)"

    def __call__(
        self,
        series: Series,
        horizon: int,
        quantiles: Sequence[float] | None = None,
        context: int | None = None,
        columns: Sequence[str] | None = None,
        seed: int = 0,
        batch_series: int = 32,
    ) -> list[Forecast]:
        """Return the next ``horizon`` points of each series.

        ``series`` is one series or several, of any lengths: lists or arrays, with NaN or None for
        points that were not observed. ``quantiles`` are between 0 and 1; None = 0.1, 0.5 and 0.9
        where the model forecasts a distribution. The last ``context`` points are read; None = as
        many as in the model's training, or its most. ``columns`` name the series: those that the
        model was trained on are scaled as they were there. ``seed`` is that of models that draw
        samples. A series whose context is constant goes on as it is. Raises :class:`ConfigError`
        for what cannot be continued.
        """
        question = self.question(horizon, quantiles, context, seed)
        return self.run_all(self.contexts_of(series, question, columns), question, batch_series)

    def run_all(
        self, contexts: Sequence[Context], question: Question, batch_series: int = 32
    ) -> list[Forecast]:
        """Return the forecasts of contexts of any lengths, at most so many at a time."""
        if batch_series < 1:
            raise ConfigError(f"batch_series is {batch_series}; use a number from 1 upwards.")
        found: dict[int, Forecast] = {}
        for places in alike(contexts, batch_series):
            forecasts = self.run([contexts[place] for place in places], question)
            found |= zip(places, forecasts, strict=True)
        return [found[place] for place in range(len(contexts))]

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
        most = self.model.most_points - horizon
        if most < LEAST_POINTS:
            raise ConfigError(
                f"horizon is {horizon}, but the model takes {self.model.most_points} points, the "
                f"context's {LEAST_POINTS} or more among them; use a smaller one."
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
        usual = min(most, self.trained_on.context or most)
        return Question(horizon, asked, context or usual, seed)

    def contexts_of(
        self, series: Series, question: Question, columns: Sequence[str] | None = None
    ) -> list[Context]:
        """Return what is read of each series; raises :class:`ConfigError`."""
        numbered = list(rows_of(series))
        if columns is not None and len(columns) != len(numbered):
            raise ConfigError(
                f"columns has {len(columns)} names, but there are {len(numbered)} series; give one "
                "for each."
            )
        return [
            self.context_of(one, question, f"series {n}", None if columns is None else columns[n])
            for n, one in numbered
        ]

    def context_of(
        self, values: Series, question: Question, name: str, column: str | None = None
    ) -> Context:
        """Return what is read of one series of a column, from the first observed point on.

        ``name`` is the series' in messages. Raises :class:`ConfigError`.
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
        scale = None if column is None else self.trained_on.scales.get(column)
        context = Context(values_L, scale or scale_of(values_L), name)
        check_scaled(context)
        return context

    @torch.inference_mode()
    def run(self, contexts: Sequence[Context], question: Question) -> list[Forecast]:
        """Return the forecasts of contexts of equal length, which :meth:`context_of` made.

        Raises :class:`ConfigError` for a forecast that is not finite.
        """
        moving = [context for context in contexts if context.constant is None]
        found = self._predict(moving, question) if moving else []
        for context, forecast in zip(moving, found, strict=True):
            if not forecast.is_finite:
                raise ConfigError(
                    f"{context.name} has a forecast that is not finite: numbers of the model "
                    "overflow; correct outliers in the series, or read another context."
                )
        predicted = iter(found)
        return [
            next(predicted) if context.constant is None else self._flat(context.constant, question)
            for context in contexts
        ]

    def _flat(self, value: float, question: Question) -> Forecast:
        """Return the forecast of a series that has had one value only."""
        flat_H = np.full(question.horizon, value)
        if not self.model.forecasts_quantiles:
            return Forecast(flat_H, None)
        return Forecast(flat_H, {quantile: flat_H.copy() for quantile in question.quantiles})

    def _predict(self, contexts: list[Context], question: Question) -> list[Forecast]:
        """Return the forecasts of contexts that are not constant."""
        scaled_NL = np.stack([context.scaled() for context in contexts])
        observed_NL = ~np.isnan(np.stack([context.values_L for context in contexts]))
        found = self.model.predict(
            torch.from_numpy(scaled_NL).float().to(self.model.device),
            torch.from_numpy(observed_NL).to(self.model.device),
            question.horizon,
            question.quantiles,
            question.seed,
        )
        mean_N1, std_N1 = np.array([context.scale for context in contexts]).T[:, :, None]
        mean_NH = found.mean_BH.double().cpu().numpy() * std_N1 + mean_N1
        if found.quantiles_BHQ is None:
            return [Forecast(mean_H, None) for mean_H in mean_NH]
        quantiles_QNH = found.quantiles_BHQ.double().cpu().numpy().transpose(2, 0, 1)
        quantiles_QNH = quantiles_QNH * std_N1 + mean_N1
        return [
            Forecast(mean_H, dict(zip(question.quantiles, quantiles_QNH[:, row], strict=True)))
            for row, mean_H in enumerate(mean_NH)
        ]
