"""Series as users have them, as arrays.

N series, L points of each, H points ahead.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from ...errors import ConfigError

MOST_VALUE = 1e100
"""The squares of a context are added up in fp64."""
MOST_SCALED = float(np.finfo(np.float32).max)
"""Models read scaled values in fp32."""

UNOBSERVED = frozenset({"", "nan", "na", "n/a", "null", "none"})
"""Cells of a table, in small letters, that say that a point was not observed."""

Series: TypeAlias = Any
"""One series (numbers, None or NaN where a point was not observed), or several: lists, arrays."""


def rows_of(series: Series) -> Iterator[tuple[int, Series]]:
    """Yield each series with its number: ``series`` may be one of them or several."""
    if isinstance(series, str) or not hasattr(series, "__len__"):
        raise ConfigError(f"series is {series!r:.40}; give lists or arrays of numbers.")
    if not len(series):
        raise ConfigError("series is empty; give at least one.")
    is_one = not hasattr(series[0], "__len__") or isinstance(series[0], str)
    yield from enumerate([series] if is_one else series)


def numbers_of(values: Series, name: str) -> np.ndarray:
    """Return a series as fp64 ``[L]``, NaN for None; raises :class:`ConfigError` for all else."""
    if not isinstance(values, np.ndarray) or values.dtype == object:
        wrong = next((v for v in values if v is not None and not _is_number(v)), None)
        if wrong is not None:
            raise ConfigError(f"{name} has {wrong!r:.40}, which is not a number; correct it.")
    try:
        found = np.asarray(values).astype(np.float64)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"{name} is not a list of numbers; give one.") from None
    if found.ndim != 1:
        raise ConfigError(f"{name} has {found.ndim} dimensions; give a list of numbers.")
    if np.isinf(found).any():
        place = int(np.isinf(found).argmax())
        raise ConfigError(f"{name} is infinite at point {place}; correct it, or leave it out.")
    if np.nanmax(np.abs(found), initial=0) > MOST_VALUE:
        raise ConfigError(
            f"{name} has values beyond {MOST_VALUE:g}, whose squares cannot be added up; give it "
            "in other units."
        )
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


class Scale(NamedTuple):
    """How the values of a series become what a model reads: less the mean, over the deviation."""

    mean: float
    std: float


@dataclass(frozen=True, slots=True)
class Context:
    """What is read of a series, in its units."""

    values_L: np.ndarray
    """fp64, NaN where a point was not observed; the first one was."""
    scale: Scale
    name: str
    """The series' in messages."""

    def __len__(self) -> int:
        """Return the points."""
        return len(self.values_L)

    @property
    def constant(self) -> float | None:
        """The value that all observed points have, if there is one."""
        low, high = np.nanmin(self.values_L), np.nanmax(self.values_L)
        return float(low) if low == high else None

    def scaled(self) -> np.ndarray:
        """Return what a model reads, ``[L]``: where none was observed, the last one that was."""
        places_L = np.where(np.isnan(self.values_L), 0, np.arange(len(self.values_L)))
        values_L = self.values_L[np.maximum.accumulate(places_L)]
        return (values_L - self.scale.mean) / self.scale.std


class Forecast(NamedTuple):
    """What comes after one series, fp64 in its units."""

    mean: np.ndarray
    """``[H]``: the mean, or the only value of a model that forecasts points."""
    quantiles: dict[float, np.ndarray] | None
    """``[H]`` each; None if the model forecasts points."""

    @property
    def named_quantiles(self) -> dict[str, np.ndarray] | None:
        """The quantiles by the shortest text that stands for each: ``"0.1"``."""
        if self.quantiles is None:
            return None
        return {repr(float(quantile)): values_H for quantile, values_H in self.quantiles.items()}

    @property
    def is_finite(self) -> bool:
        """Whether all of its values are numbers."""
        parts = (self.mean, *(self.quantiles or {}).values())
        return all(np.isfinite(values_H).all() for values_H in parts)


def scale_of(values_L: np.ndarray) -> Scale:
    """Return mean and deviation of the observed points of a context."""
    return Scale(float(np.nanmean(values_L)), float(np.nanstd(values_L)))


def check_scaled(context: Context) -> None:
    """Raise :class:`ConfigError` for a context that a model cannot read at its scale."""
    if context.constant is not None:
        return
    mean, std = context.scale
    if not std > 0:
        raise ConfigError(
            f"{context.name} varies so little that its standard deviation rounds to 0; give it in "
            "other units."
        )
    with np.errstate(over="ignore"):
        scaled_L = np.abs(context.scaled())
    if not (scaled_L <= MOST_SCALED).all():
        value = context.values_L[int(np.argmax(scaled_L))]
        raise ConfigError(
            f"{context.name} has {value:g}, which is beyond fp32 less the mean {mean:g} and over "
            f"the deviation {std:g} of the model's training; correct it, or name no column."
        )


def alike(contexts: Sequence[Context], most: int) -> Iterator[list[int]]:
    """Yield the places of contexts of one length, at most so many at a time."""
    by_length: dict[int, list[int]] = {}
    for place, context in enumerate(contexts):
        by_length.setdefault(len(context), []).append(place)
    for places in by_length.values():
        for start in range(0, len(places), most):
            yield places[start : start + most]
