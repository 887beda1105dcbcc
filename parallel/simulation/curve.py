"""A share of the peak: one number, or a curve measured at some numbers of rows."""

import itertools
import math
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

Curve = dict[float, float]
"""Rows to the share of the peak that products with so many rows reach."""


def _readable(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float | dict):
        raise ValueError(f"it is {value!r}; write a share such as 0.5, or {{rows: share}}.")
    return value


def _checked(share: float | Curve) -> float | Curve:
    shares = list(share.values()) if isinstance(share, dict) else [share]
    if not shares or not all(0 < s <= 1 for s in shares):
        raise ValueError("it must be above 0 and at most 1.")
    if isinstance(share, dict) and not all(rows > 0 for rows in share):
        raise ValueError("its rows must be above 0.")
    return share


Share = Annotated[float | Curve, BeforeValidator(_readable), AfterValidator(_checked)]


def at(share: float | Curve, rows: float) -> float:
    """Return the share at ``rows``: straight lines over log(rows), and flat outside."""
    if not isinstance(share, dict):
        return share
    points = sorted((math.log(size), value) for size, value in share.items())
    place = math.log(max(rows, 1e-9))
    if place <= points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if place <= x1:
            return y0 + (y1 - y0) * (place - x0) / (x1 - x0)
    return points[-1][1]


def scaled(share: float | Curve, factor: float) -> float | Curve:
    """Return the share times ``factor``, at most 1."""
    if isinstance(share, dict):
        return {rows: min(1.0, value * factor) for rows, value in share.items()}
    return min(1.0, share * factor)
